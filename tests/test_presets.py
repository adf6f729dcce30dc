"""Every preset loads into its program, says its own command first, and its objectives and encoder can be built."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from finetune.config import FinetuneConfig
from pretrain.config import PretrainConfig
from vitssl import objectives
from vitssl.config import load
from vitssl.models.encoder import Encoder
from vitssl.train.planning import outline

CONFIGS = Path(__file__).parents[1] / "configs"
PROGRAMS = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
PRESETS = [path for program in PROGRAMS for path in sorted((CONFIGS / program).glob("*.yaml"))]
LAUNCH = sorted((CONFIGS / "launch").glob("*.yaml"))
COMMAND = r"# (?:python|torchrun [^=]*|accelerate launch [^=]*) -m (pretrain|finetune)( .*)?"
COUNTS = {
    "compute_environment",
    "distributed_type",
    "num_machines",
    "num_processes",
    "main_process_port",
    "machine_rank",
    "use_cpu",
}

preset = pytest.mark.parametrize("path", PRESETS, ids=lambda path: f"{path.parent.name}/{path.stem}")


@preset
def test_a_preset_loads_and_says_its_command(path: Path):
    program = path.parent.name
    config = load(PROGRAMS[program], path)
    first, second = path.read_text().splitlines()[:2]
    command = re.fullmatch(COMMAND, first)
    assert command and command[1] == program and second.startswith("# ")
    words = shlex.split((command[2] or "").replace("...", "x"))
    own = str(path.relative_to(CONFIGS.parent))
    assert path.stem == "demo" or words[0] == own, "the command names this file"
    settings = [word for word in words if word != own]
    assert all("=" in word for word in settings), "and settings"
    assert load(PROGRAMS[program], path, settings).run == config.run


@pytest.mark.parametrize("path", [path for path in PRESETS if path.parent.name == "pretrain"], ids=lambda path: path.stem)
def test_a_pretraining_preset_can_be_built(path: Path):
    config = load(PretrainConfig, path)
    encoder = outline(lambda: Encoder.create(config.encoder.name, **config.encoder.model_dump(exclude={"name"})))
    assert config.objectives
    for name, settings in config.objectives.items():
        assert outline(lambda: objectives.create(name, settings, encoder.spec)).views()  # noqa: B023


def test_names_of_runs_differ():
    names = [load(PROGRAMS[path.parent.name], path).run.name for path in PRESETS]
    assert len(names) > 4 and len(set(names)) == len(names)


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.stem)
def test_a_launch_file_only_counts_processes(path: Path):
    values = yaml.safe_load(path.read_text())
    assert set(values) <= COUNTS and {"num_processes", "num_machines"} <= set(values)
    assert values["num_processes"] % values["num_machines"] == 0
    first = path.read_text().splitlines()[0]
    assert re.fullmatch(
        rf"# accelerate launch --config_file configs/launch/{path.name} .*-m (pretrain|finetune) CONFIG.*", first
    )


def test_there_are_presets():
    assert {"demo", "small", "mae_vit_b16"} <= {path.stem for path in PRESETS} and len(LAUNCH) > 1
