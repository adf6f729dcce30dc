"""Config: frozen, strict, and exactly what the user wrote. YAML over typed sections; errors are one line.

``base:`` files merge left to right, the file itself next, ``key.path=value`` arguments last; in a table of named parts
(objectives), ``name=null`` removes the part. A config names values, never Python. No torch is imported here.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError

from vitssl.errors import ConfigError
from vitssl.schedule import Duration

T = TypeVar("T", bound="Section")


class Section(BaseModel):
    """A typed part of a config: unknown keys are errors, values cannot change."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


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


Time = Annotated[Duration, BeforeValidator(_read_duration), PlainSerializer(str)]
"""A duration in a config: ``300ep``, ``5%`` or ``12_500``."""
Count = Annotated[int, BeforeValidator(_not_bool), AfterValidator(_positive)]
"""A whole number of things, at least 1."""


def load(model: type[T], path: Path | None, overrides: Sequence[str] = ()) -> T:
    """Read ``path`` with its bases, apply ``key.path=value`` overrides and validate. Raises ConfigError, one line each."""
    values = _read(path, ()) if path is not None else {}
    for text in overrides:
        values = _merge(values, _override(text))
    return build(model, values, where=str(path) if path else "the command line")


def build(model: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """Validate plain values as a ``model``. Raises ConfigError naming the full key, the value, what is allowed."""
    try:
        return model.model_validate(_without_removed(values))
    except ValidationError as error:
        raise ConfigError(_explain(model, error, where)) from None


def dump(config: Section) -> str:
    """The config as YAML that :func:`load` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def difference(old: Mapping[str, Any], new: Mapping[str, Any], *, ignore: Sequence[str] = ()) -> list[str]:
    """``key: old -> new`` for every leaf that differs, but for keys that start with one of ``ignore``."""
    before, after = _flat(old), _flat(new)
    keys = [key for key in {**before, **after} if not any(key == name or key.startswith(name + ".") for name in ignore)]
    absent = "(absent)"
    return [
        f"{key}: {before.get(key, absent)} -> {after.get(key, absent)}"
        for key in keys
        if before.get(key, absent) != after.get(key, absent)
    ]


def describe(model: type[Section], prefix: str = "") -> list[tuple[str, str, str]]:
    """(key, default, description) of every leaf of a section, for ``--help``."""
    rows: list[tuple[str, str, str]] = []
    for name, field in model.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None:
            rows += describe(inner, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else field.get_default(call_default_factory=True)
        default = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
        rows.append((prefix + name, default, field.description or ""))
    return rows


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as people expect it: ``1e-4`` is a number, a key written twice is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$|^[-+]?\.\d[\d_]*([eE][-+]?\d+)?$|^[-+]?\d[\d_]*\.[\d_]*$"),
    list("-+0123456789."),
)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if key.value in seen:
            raise ConfigError(f"{key.start_mark.name}:{key.start_mark.line + 1}: key {key.value!r} stands twice; keep one")
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def _parse(text: str, name: str) -> Any:
    loader = _Loader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{name}{line}: not YAML: {getattr(error, 'problem', None) or error}") from None
    finally:
        loader.dispose()


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
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
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


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, Mapping) or not values:
        return {prefix.rstrip("."): values}
    return {key: leaf for name, value in values.items() for key, leaf in _flat(value, f"{prefix}{name}.").items()}


def _section_of(annotation: Any) -> type[Section] | None:
    """The section inside an annotation such as ``Section``, ``Section | None``, if there is one."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _explain(model: type[Section], error: ValidationError, where: str) -> str:
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    key, more = ".".join(path), error.error_count() - 1
    tail = f" (and {more} more)" if more else ""
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key{_nearest(model, path)} (in {where}){tail}"
    if first["type"] == "missing":
        return f"{key}: has no value and needs one (in {where}){tail}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{key}={first['input']!r}: {message[:1].lower()}{message[1:]} (in {where}){tail}"


def _nearest(model: type[Section], path: list[str]) -> str:
    known = [key for key, _, _ in describe(model)]
    groups = {".".join(key.split(".")[:depth]) for key in known for depth in range(1, key.count(".") + 2)}
    full = ".".join(path)
    siblings = [key for key in groups if key.rpartition(".")[0] == full.rpartition(".")[0]]
    by_name = [key for key in known if key.rpartition(".")[2] == path[-1]]
    near = difflib.get_close_matches(full, siblings, n=1, cutoff=0.5) or by_name[:1]
    return f"; did you mean {near[0]}?" if near else f"; allowed here: {', '.join(sorted(siblings))}" if siblings else ""
