"""Config: frozen, strict, and exactly what the user wrote. YAML over typed sections; errors are one line.

``base:`` files merge left to right, the file itself next, ``key.path=value`` arguments last; in a table of named parts
(objectives), ``name=null`` removes the part. A config names values, never Python. No torch is imported here.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError, model_validator

from vitssl.errors import ConfigError
from vitssl.schedule import Duration

T = TypeVar("T", bound="Section")


class Section(BaseModel):
    """A typed part of a config: unknown keys are errors, values cannot change.

    Keys given where the default is a section change that: the second crop of a pair keeps its colours when its scale is set.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _upon_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        defaults = {name: field.default for name, field in cls.model_fields.items() if isinstance(field.default, Section)}
        return {key: _merge(_changed(defaults[key], None), own) if key in defaults else own for key, own in values.items()}


def _changed(section: Section, usual: Section | None) -> dict[str, Any]:
    """The values by which ``section`` differs from ``usual``, or from a new one of its class, section by section."""
    found = section.model_dump()
    for name, field in type(section).model_fields.items():
        value, other = getattr(section, name), field.default if usual is None else getattr(usual, name)
        if value == other:
            del found[name]
        elif isinstance(value, Section) and type(value) is type(other):
            found[name] = _changed(value, other)
    return found


def _read_duration(value: Any) -> Duration:
    try:
        return Duration.parse(value)
    except ConfigError as error:
        raise ValueError(str(error)) from error


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is expected, not true or false")
    return value


def _positive(value: float) -> float:
    if value <= 0:
        raise ValueError("must be greater than 0")
    return value


def _longer_than_nothing(value: Duration) -> Duration:
    if not value.value:
        raise ValueError("must be longer than 0")
    return value


Time = Annotated[Duration, BeforeValidator(_read_duration), PlainSerializer(str)]
"""A duration in a config: ``300ep``, ``5%`` or ``12_500``."""
Every = Annotated[Time, AfterValidator(_longer_than_nothing)]
"""A duration between two of something."""
Count = Annotated[int, BeforeValidator(_not_bool), AfterValidator(_positive)]
"""A whole number of things, at least 1."""


def load(model: type[T], path: Path | None, overrides: Sequence[str] = ()) -> T:
    """Read ``path`` with its bases, apply ``key.path=value`` overrides and validate. Raises ConfigError, one line each."""
    values = _read(path, ()) if path is not None else {}
    typed: dict[str, str] = {}
    for text in overrides:
        key = text.partition("=")[0]
        if key in typed:
            raise ConfigError(
                f"{key} is given twice on the command line ({typed[key]} and {text}); give it once, and quote patterns that the"
                " shell would expand"
            )
        typed[key] = text
        values = _merge(values, _override(text))
    return build(model, values, where=str(path) if path else "the command line", typed=tuple(typed))


def build(model: type[T], values: Mapping[str, Any], *, where: str, typed: Sequence[str] = ()) -> T:
    """Validate plain values as a ``model``. Raises ConfigError naming the full key, the value, what is allowed.

    ``where`` the values stand, for messages, but for the keys ``typed`` on the command line.
    """
    try:
        return model.model_validate(_without_removed(values))
    except ValidationError as error:
        raise ConfigError(_explain(model, error, where, typed)) from None


def dump(config: Section) -> str:
    """The config as YAML that :func:`load` reads back to an equal config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def difference(old: Mapping[str, Any], new: Mapping[str, Any], *, ignore: Sequence[str] = ()) -> list[str]:
    """``key: old -> new`` for every leaf that differs, but for keys that start with one of ``ignore``."""
    before, after = flat(old), flat(new)
    keys = [key for key in {**before, **after} if not any(key == name or key.startswith(name + ".") for name in ignore)]
    absent = "(absent)"
    return [
        f"{key}: {before.get(key, absent)} -> {after.get(key, absent)}"
        for key in keys
        if before.get(key, absent) != after.get(key, absent)
    ]


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested tables as one table of full keys: {"run": {"name": "a"}} -> {"run.name": "a"}."""
    if not isinstance(values, Mapping) or not values:
        return {prefix.rstrip("."): values}
    return {key: leaf for name, value in values.items() for key, leaf in flat(value, f"{prefix}{name}.").items()}


def describe(model: type[Section], prefix: str = "") -> list[tuple[str, str, str]]:
    """(key, default, description) of every leaf of a section, for ``--help``."""
    rows: list[tuple[str, str, str]] = []
    for name, field in model.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None and get_origin(field.annotation) is not list:
            several = "NAME." if get_origin(field.annotation) is dict else ""
            rows += describe(inner, f"{prefix}{name}.{several}")
            continue
        default = "required" if field.is_required() else field.get_default(call_default_factory=True)
        default = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
        rows.append((prefix + name, default, field.description or ""))
    return rows


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as people expect it: ``1e-4`` is a number, ``2024-01-31`` is a name, a key written twice is an error."""


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either YAML 1.1 or :class:`_Loader` would not read back as the string it is."""


_FLOAT = re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$|^[-+]?\.\d[\d_]*([eE][-+]?\d+)?$|^[-+]?\d[\d_]*\.[\d_]*$")
for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        place = f"{key.start_mark.name}:{key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{place}: a key is one word, not a list or a table")
        if key.value in seen:
            raise ConfigError(f"{place}: key {key.value!r} stands twice; keep one")
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def _parse(text: str, name: str) -> Any:
    try:
        loader = _Loader(text)
        loader.name = name
        return loader.get_single_data()
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{_shown(name)}{line}: not YAML: {problem}") from None


def _read(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    path = Path(path)
    if path.resolve() in chain:
        raise ConfigError(f"{path}: is a base of itself, by way of {' -> '.join(str(p) for p in chain)}")
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"config {path} cannot be read: {reason}{hint}") from None
    values = _parse(text, str(path)) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config is a table of keys and values, not a {type(values).__name__}")
    bases = values.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: base={bases!r}: give the path of a config, or a list of paths")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = _merge(merged, _read(path.parent / base, (*chain, path.resolve())))
    return _merge(merged, values)


def _override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not all(part for part in key.split(".")):
        raise ConfigError(f"{text!r} is not an override; write key.path=value, as in data.path=/my/photos")
    values: Any = _parse(value, text) if value else ""
    for part in reversed(key.split(".")):
        values = {part: values}
    return values


def _merge(under: Any, over: Any) -> Any:
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    return {**under, **{key: _merge(under.get(key), value) for key, value in over.items()}}


def _without_removed(values: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(values.get("objectives"), dict):
        parts = {name: part for name, part in values["objectives"].items() if part is not None}
        return {**values, "objectives": parts}
    return dict(values)


def _section_of(annotation: Any) -> type[Section] | None:
    """The section inside an annotation such as ``Section``, ``Section | None``, if there is one."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _explain(model: type[Section], error: ValidationError, where: str, typed: Sequence[str]) -> str:
    failures = error.errors(include_url=False)
    places = [_place(model, failure["loc"]) for failure in failures]
    first, path = failures[0], places[0]
    key, more = _shown(".".join(path)), len({tuple(place) for place in places}) - 1
    alike = sum(place[: len(path)] == path for place in places)
    here = f"{'.'.join(path)}."
    unknown = first["type"] == "extra_forbidden"  # of agument.flip=0 it is agument that is not known
    if any(here.startswith(f"{name}.") or (unknown and f"{name}.".startswith(here)) for name in typed):
        where = "the command line"
    tail = f" (in {where})" + (f" (and {more} more)" if more and alike == 1 else "")
    if unknown:
        return f"{key}: unknown key{_nearest(model, path)}{tail}"
    if first["type"] == "missing":
        return f"{key}: has no value and needs one{tail}"
    if first["type"] == "model_type":
        return f"{key}={first['input']!r}: is a section; set its keys, as in {key}.key=value{tail}"
    if alike > 1:  # no form of a union fits: its description says what they are
        described = {name: description for name, _, description in describe(model)}
        return f"{key}={first['input']!r}: does not fit; wanted is {described.get(key, 'another kind of value')}{tail}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{key}={first['input']!r}: {message[:1].lower()}{message[1:]}{tail}"


def _place(model: type[Section], location: Sequence[str | int]) -> list[str]:
    """The key of a failure as the user writes it: pydantic's names for the forms of a union are left out."""
    section: type[Section] | None = model
    named, path = True, []
    for part in location:
        if named or isinstance(part, int):
            path.append(str(part))
        field = section.model_fields.get(part) if section and isinstance(part, str) else None
        if field is not None:
            section = _section_of(field.annotation)
            named = section is not None or get_origin(field.annotation) is dict
    return path


def _shown(text: str) -> str:
    """Text for a message: as it is, or quoted where it holds what cannot be printed."""
    return text if text.isprintable() else ascii(text)


def _nearest(model: type[Section], path: list[str]) -> str:
    known = [key for key, _, _ in describe(model)]
    groups = {".".join(key.split(".")[:depth]) for key in known for depth in range(1, key.count(".") + 2)}
    siblings = {key.rpartition(".")[2]: key for key in groups if key.rpartition(".")[0] == ".".join(path[:-1])}
    elsewhere = [key for key in known if key.rpartition(".")[2] == path[-1]]
    near = elsewhere or [siblings[name] for name in difflib.get_close_matches(path[-1], siblings, n=1, cutoff=0.5)]
    allowed = f"; allowed here: {', '.join(sorted(siblings.values()))}" if siblings else ""
    return f"; did you mean {near[0]}?" if near else allowed
