"""Config: merging, overrides, what YAML means, errors in one line that name key, value and the nearest name, round trips."""

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from finetune.config import FinetuneConfig
from pretrain.config import PretrainConfig
from vitssl.config import Count, Section, Time, build, describe, difference, dump, load
from vitssl.errors import ConfigError
from vitssl.schedule import Duration
from vitssl.sections import EncoderConfig, OptimConfig, ProgramConfig, Size

PROGRAMS = [PretrainConfig, FinetuneConfig]


class Inner(Section):
    rate: float = Field(1e-3, gt=0, description="how fast")
    size: Size = Field(8, description="one number or [height, width]")
    time: Time = Field(Duration(5, "%"), description="how long")


class Pair(Section):
    first: Inner = Inner(rate=1.0)
    second: Inner = Inner(rate=2.0, size=16)


class Outer(Section):
    name: str = Field("it", description="what it is called")
    count: Count | None = None
    inner: Inner = Inner()
    maybe: Inner | None = None
    needed: int = Field(description="always given")
    objectives: dict[str, Any] = {}


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / "main.yaml"


def test_bases_merge_left_to_right_then_the_file_then_arguments(tmp_path: Path):
    path = write(
        tmp_path,
        a="name: a\nneeded: 1\ninner: {rate: 0.1, size: 1}\n",
        b="name: b\nbase: a.yaml\ninner: {size: 2}\ncount: 2\n",
        c="count: 3\nobjectives: {x: {k: 1, l: 1}, y: {}}\n",
        main="base: [b.yaml, c.yaml]\ncount: 4\nobjectives: {x: {k: 2}}\n",
    )
    config = load(Outer, path, ["inner.time=3ep", "objectives.z.k=5", "objectives.z.l=6", "count=5"])
    assert config.model_dump() == {
        "name": "b",
        "count": 5,
        "inner": {"rate": 0.1, "size": 2, "time": "3ep"},
        "maybe": None,
        "needed": 1,
        "objectives": {"x": {"k": 2, "l": 1}, "y": {}, "z": {"k": 5, "l": 6}},
    }


@pytest.mark.parametrize(
    "given, second",
    [
        ({}, Inner(rate=2.0, size=16)),
        ({"size": 4}, Inner(rate=2.0, size=4)),
        ({"rate": 3.0, "time": "7%"}, Inner(rate=3.0, size=16, time=Duration(7, "%"))),
    ],
)
def test_keys_of_a_section_change_the_default_that_its_place_has(given: dict[str, Any], second: Inner):
    """Not that of the section's own kind: the second of a pair keeps what it has beside the first."""
    pair = build(Pair, {"second": given}, where="here")
    assert pair == Pair(second=second) and pair.first == Inner(rate=1.0)
    assert build(Pair, {"second": Inner()}, where="here").second == Inner(), "a whole section stands for itself"


def test_null_removes_an_objective(tmp_path: Path):
    path = write(tmp_path, a="objectives: {x: {k: 1}, y: {}}", main="base: a.yaml\nneeded: 1\nobjectives: {w: {}}")
    assert load(Outer, path, ["objectives.x=null"]).objectives == {"y": {}, "w": {}}


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        ("-.5", -0.5),
        (".5e-3", 5e-4),
        ("1_000", 1000),
        ("12_500.5", 12500.5),
        ("2.", 2.0),
        ("7", 7),
        ("null", None),
        ("true", True),
        ("300ep", "300ep"),
        ("5%", "5%"),
        ("2024-01-31", "2024-01-31"),
        ("2024-13-45", "2024-13-45"),
        ("'1e4'", "1e4"),
        ("/my photos/a", "/my photos/a"),
        ("train-{00..99}.tar", "train-{00..99}.tar"),
        ("a=b", "a=b"),
        ("[1, 2e0]", [1, 2.0]),
        ("{a: {b: 1e1}}", {"a": {"b": 10.0}}),
        ("", ""),
    ],
)
def test_what_an_override_means(text: str, value: Any):
    found = load(Outer, None, ["needed=1", f"objectives.x={text}", "objectives.y=1"]).objectives
    assert found == ({"y": 1} if value is None else {"x": value, "y": 1})
    assert value is None or type(found["x"]) is type(value)


REFUSED = [  # overrides of an Outer, what the message says
    (["nmae=a"], r"nmae: unknown key; did you mean name\? \(in the command line\)"),
    (["inner.tmie=3"], r"inner.tmie: unknown key; did you mean inner.time\?"),
    (["rate=3"], r"rate: unknown key; did you mean inner.rate\?"),
    (["inner.qqqq=3"], r"inner.qqqq: unknown key; allowed here: inner.rate, inner.size, inner.time"),
    (["name.x=3"], r"name=\{'x': 3\}: input should be a valid string"),
    (["inner=5"], r"inner=5: is a section; set its keys, as in inner.key=value"),
    (["inner.rate=abc"], r"inner.rate='abc': input should be a valid number"),
    (["inner.rate=-1"], r"inner.rate=-1: input should be greater than 0"),
    (["inner.rate=.nan"], r"inner.rate=nan: input should be a finite number"),
    (["inner.size=abc"], r"inner.size='abc': does not fit; wanted is one number or \[height, width\] \(in"),
    (["inner.size=[1, 2, 3]"], r"inner.size=\[1, 2, 3\]: does not fit; wanted is one number or"),
    (["inner.size=0"], r"inner.size=0: does not fit"),
    (["inner.time=long"], r"inner.time='long': 'long' is not a duration; write epochs as 300ep"),
    (["count=true"], r"count=True: a number is expected, not true or false"),
    (["count=0"], r"count=0: must be greater than 0"),
    (["maybe.rate=x"], r"maybe.rate='x': input should be"),
    (["needed=null"], r"needed=None: input should be a valid integer"),
    (["name=[1"], r"name=\[1:1: not YAML: expected ',' or '\]'"),
    (["name=\x07"], r"'name=\\x07': not YAML: unacceptable character #x0007"),
    (["name=!!python/object:os.system 1"], r"not YAML: could not determine a constructor for the tag"),
    (["name={a: 1, a: 2}"], r":1: key 'a' stands twice; keep one"),
    (["name={[a]: 1}"], r":1: a key is one word, not a list or a table"),
    (["a\nb=1"], r"'a\\nb': unknown key"),
    (["name=a", "count=2", "name=b"], r"name is given twice on the command line \(name=a and name=b\); give it once"),
    (["name"], r"'name' is not an override; write key.path=value"),
    (["inner..rate=1"], r"'inner..rate=1' is not an override"),
    (["nmae=a", "inner.rate=x"], r"\(and 1 more\)"),
]


@pytest.mark.parametrize("overrides, message", REFUSED, ids=lambda value: str(value)[:30])
def test_refused_overrides(overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message) as error:
        load(Outer, None, [*({"needed=1"} - {text.replace("null", "1") for text in overrides}), *overrides])
    assert "\n" not in str(error.value)


def test_an_unknown_section_that_was_typed_is_of_the_command_line(tmp_path: Path):
    path = write(tmp_path, main="needed: 1\n")
    with pytest.raises(ConfigError, match=r"^innre: unknown key; did you mean inner\? \(in the command line\)"):
        load(Outer, path, ["innre.time=3"])


REFUSED_FILES = [  # main.yaml, what the message says
    ("needed: 1\nname: a\nname: b\n", r"main.yaml:3: key 'name' stands twice"),
    ("needed: 1\ninner: {rate: 1, rate: 2}\n", r"main.yaml:2: key 'rate' stands twice"),
    ("name: a\n", r"needed: has no value and needs one \(in .*main.yaml\)"),
    ("- 1\n", r"main.yaml: a config is a table of keys and values, not a list"),
    ("name: [\n", r"main.yaml:2: not YAML"),
    ("name: 'a\x00'\n", r"main.yaml: not YAML: unacceptable character"),
    ("base: main.yaml\n", r"main.yaml: is a base of itself"),
    ("base: round.yaml\n", r"main.yaml: is a base of itself, by way of .*main.yaml -> .*round.yaml"),
    ("base: 3\n", r"main.yaml: base=3: give the path of a config"),
    ("base: [null]\n", r"main.yaml: base=\[None\]: give"),
    ("base: nain.yaml\n", r"nain.yaml cannot be read: No such file or directory; did you mean .*main.yaml\?"),
    ("base: binary.yaml\n", r"binary.yaml cannot be read: not a text file"),
    ("base: '..'\n", r"cannot be read: Is a directory"),
]


@pytest.mark.parametrize("text, message", REFUSED_FILES, ids=lambda value: value[:20])
def test_refused_files(text: str, message: str, tmp_path: Path):
    path = write(tmp_path, main=text, round="base: main.yaml\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=message) as error:
        load(Outer, path)
    assert "\n" not in str(error.value)


def test_an_empty_file_is_all_defaults(tmp_path: Path):
    assert load(Outer, write(tmp_path, main="# nothing\n"), ["needed=2"]) == Outer(needed=2)


def test_a_config_does_not_change():
    with pytest.raises(ValueError, match="frozen"):
        Outer(needed=1).needed = 2


printable = st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"))  # PyYAML writes a few line breaks it cannot read
words = st.one_of(
    st.sampled_from(["1e4", "2024-01-31", "null", "yes", "0x1f", "1:30", "300ep", "-", ""]), st.text(printable, max_size=8)
)
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), words)
inners = st.builds(
    Inner,
    rate=st.floats(1e-12, 1e12),
    size=st.one_of(st.integers(1, 999), st.tuples(st.integers(1, 99), st.integers(1, 99))),
    time=st.builds(Duration, st.floats(0, 1e9), st.sampled_from(["ep", "%"]))
    | st.builds(Duration, st.integers(0, 10**9), st.just("steps")),
)
outers = st.builds(
    Outer,
    name=words,
    count=st.none() | st.integers(1, 10**12),
    inner=inners,
    maybe=st.none() | inners,
    needed=st.integers(),
    objectives=st.dictionaries(words, st.dictionaries(words, leaves | st.lists(leaves, max_size=2), max_size=3), max_size=3),
)


@settings(max_examples=60, deadline=None)
@given(outers)
def test_what_is_dumped_loads_again(tmp_path_factory: pytest.TempPathFactory, config: Outer):
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(dump(config), newline="")
    assert load(Outer, path) == config
    assert yaml.safe_load(dump(config)) == config.model_dump(mode="json")


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_programs_configs_round_trip(program: type[ProgramConfig], tmp_path: Path):
    config = load(program, None, ["run.name='1e4'", "optim.base_lr=3e-7", "length=33.3333333ep", "seed=3"])
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(program, tmp_path / "config.yaml") == config


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_leaf_is_described(program: type[ProgramConfig]):
    def leaves_of(model: Section, prefix: str = "") -> set[str]:
        values = {name: getattr(model, name) for name in type(model).model_fields}
        for name, field in type(model).model_fields.items():  # a section that may be missing is described as if it were there
            kinds = [kind for kind in get_args(field.annotation) if isinstance(kind, type) and issubclass(kind, Section)]
            if values[name] is None and kinds:
                values[name] = kinds[0].model_construct(name="x")
        inner = [leaves_of(value, f"{prefix}{name}.") for name, value in values.items() if isinstance(value, Section)]
        return {prefix + name for name, value in values.items() if not isinstance(value, Section)}.union(*inner)

    rows = describe(program)
    assert {key for key, _, _ in rows} == leaves_of(program())
    assert [key for key, _, description in rows if not description] == []
    defaults = {key: default for key, default, _ in rows}
    assert (defaults["launch.compile"], defaults["micro_batch"], defaults["length"]) == ("false", "null", "100ep")
    assert {key: default for key, default, _ in describe(Outer)}["needed"] == "required"


def test_difference_shows_every_leaf_and_ignores_what_it_is_told():
    old = {"a": 1, "b": {"c": [1, 2], "d": {}, "gone": 3}, "launch": {"x": 1}, "launcher": 1}
    new = {"a": 1, "b": {"c": [1, 3], "d": {"e": None}, "f": 4}, "launch": {"x": 2}, "launcher": 2}
    assert set(difference(old, new, ignore=("launch",))) == {
        "b.c: [1, 2] -> [1, 3]",
        "b.d: {} -> (absent)",
        "b.d.e: (absent) -> None",
        "b.gone: 3 -> (absent)",
        "b.f: (absent) -> 4",
        "launcher: 1 -> 2",
    }
    assert difference(old, old) == []


def test_sections_refuse_what_the_optimiser_cannot_do():
    for values, message in [
        ({"lr_rule": "linear/0"}, "lr_rule='linear/0': is not a rule; write linear/256"),
        ({"betas": [0.9, 1.0]}, "betas.1=1.0: input should be less than 1"),
        ({"betas": [0.9]}, "betas.1: has no value and needs one"),
    ]:
        with pytest.raises(ConfigError) as error:
            build(OptimConfig, values, where="here")
        assert str(error.value).startswith(message)
    assert build(EncoderConfig, {"image_size": [32, 16]}, where="here").image_size == (32, 16)


def test_words_load_no_torch():
    modules = "vitssl.config, vitssl.command, vitssl.sections, vitssl.plan, vitssl.views, pretrain.config, finetune.config"
    code = f"import sys, {modules}; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'timm')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
