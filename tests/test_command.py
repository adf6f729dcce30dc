"""The command line of both programs: what is read, what is refused, what help says."""

import shlex
from pathlib import Path

import pytest

import finetune.config
import pretrain.config
from vitssl.command import Command, help_text, parse
from vitssl.config import describe
from vitssl.errors import ConfigError

FLAGS = {"--plan": (), "--bench": ("step", "data")}


@pytest.mark.parametrize(
    "line, expected",
    [
        ("", Command(None, (), {})),
        ("a.yaml", Command(Path("a.yaml"), (), {})),
        ("a=1 a.yaml b.c=x=y", Command(Path("a.yaml"), ("a=1", "b.c=x=y"), {})),
        ("--plan a.yaml", Command(Path("a.yaml"), (), {"--plan": ""})),
        ("a.yaml --bench step b=1", Command(Path("a.yaml"), ("b=1",), {"--bench": "step"})),
        ("-h", Command(None, (), {"--help": ""})),
        ("--help a.yaml", Command(Path("a.yaml"), (), {"--help": ""})),
        ("lr=-1", Command(None, ("lr=-1",), {})),
    ],
)
def test_read(line: str, expected: Command):
    assert parse(shlex.split(line), flags=FLAGS) == expected


@pytest.mark.parametrize(
    "line, message",
    [
        ("--plna", "--plna: unknown flag; known are --help, --plan, --bench, and settings as key.path=value"),
        ("-x", "-x: unknown flag; known are --help, --plan, --bench, and settings as key.path=value"),
        ("a.yaml b.yaml", "b.yaml: a second config file beside a.yaml; settings are written key.path=value"),
        ("--bench", "--bench: takes one of step, data"),
        ("--bench quick", "--bench quick: takes one of step, data"),
    ],
)
def test_refused(line: str, message: str):
    with pytest.raises(ConfigError) as error:
        parse(shlex.split(line), flags=FLAGS)
    assert str(error.value) == message


def test_what_was_typed_can_be_typed_again():
    argv = ["my configs/a.yaml", "data.path=/my photos/{0..9}.tar", "run.name=it's"]
    typed = parse(["--plan", *argv], flags=FLAGS).typed("pretrain")
    assert shlex.split(typed) == ["python", "-m", "pretrain", *argv]
    assert parse([], flags=FLAGS).typed("finetune") == "python -m finetune"


@pytest.mark.parametrize(
    "program, config, flags",
    [
        ("pretrain", pretrain.config.PretrainConfig, pretrain.config.FLAGS),
        ("finetune", finetune.config.FinetuneConfig, finetune.config.FLAGS),
    ],
)
def test_help_names_every_key_with_default_and_meaning(program: str, config: type, flags: dict[str, str]):
    lines = help_text(program, "What it does.", config, flags).splitlines()
    text = " ".join(" ".join(lines).split())
    assert lines[0].startswith(f"usage: python -m {program} ") and "What it does." in lines
    for flag, meaning in flags.items():
        assert any(line.split(maxsplit=flag.count(" ") + 1)[-1] == meaning for line in lines if line.startswith(f"  {flag}"))
    for key, default, meaning in describe(config):
        assert f" {key}={default} {meaning}".rstrip() in text, key
    assert all(len(line) <= 80 for line in lines[1:])


@pytest.mark.parametrize("module", [pretrain.config, finetune.config])
def test_help_is_shown_and_nothing_is_run(module, capsys: pytest.CaptureFixture):
    config, command = module.read(["no-such.yaml", "--help"])
    assert config is None and "--help" in command.flags
    assert "batch_size=" in capsys.readouterr().out


@pytest.mark.parametrize("module", [pretrain.config, finetune.config])
def test_read_takes_the_default_config_and_the_settings(module):
    config, _ = module.read(["run.name=other", "--plan"])
    assert config.run.name == "other" and config.data.kind == "demo"
