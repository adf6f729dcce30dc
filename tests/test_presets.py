"""Every preset loads into its program, says its own command first, and its objectives and encoder can be built."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from finetune.config import FinetuneConfig
from finetune.run import build_task
from pretrain.config import PretrainConfig
from vitssl import objectives
from vitssl.config import load
from vitssl.models.encoder import Encoder
from vitssl.train.optim import MOMENTS, group_parameters
from vitssl.train.planning import make_plan, outline

CONFIGS = Path(__file__).parents[1] / "configs"
PROGRAMS = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
PRESETS = [path for program in PROGRAMS for path in sorted((CONFIGS / program).rglob("*.yaml")) if path.stem != "base"]
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

preset = pytest.mark.parametrize("path", PRESETS, ids=lambda path: str(path.relative_to(CONFIGS).with_suffix("")))


def program_of(path: Path) -> str:
    return path.relative_to(CONFIGS).parts[0]


@preset
def test_a_preset_loads_and_says_its_command(path: Path):
    program = program_of(path)
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


@pytest.mark.parametrize("path", [path for path in PRESETS if program_of(path) == "pretrain"], ids=lambda path: path.stem)
def test_a_pretraining_preset_can_be_built(path: Path):
    config = load(PretrainConfig, path)
    encoder = outline(lambda: Encoder.create(config.encoder.name, **config.encoder.model_dump(exclude={"name"})))
    assert config.objectives
    teacher = SimpleNamespace(channels=3, num_classes=1000, network=SimpleNamespace(spec=encoder.spec))
    for name, settings in config.objectives.items():
        assert outline(lambda: objectives.create(name, settings, encoder.spec, teacher=teacher)).views()  # noqa: B023


IMAGENET = 1_281_167
FINETUNE = {  # steps, absolute rate, warm-up in steps, and the rate's share of the patches' layer (null: no layer decay)
    "mae_vit_b16": (125_114, 2e-3, 6256, 0.65**13),
    "mae_vit_l16": (62_557, 4e-3, 6256, 0.75**25),
    "mae_vit_h14": (62_557, 4e-3, 6256, 0.75**33),
    "vit_b16": (20_000, 0.03, 500, 1.0),
    "moco_v3_vit_b16": (187_671, 1e-3, 6256, 1.0),
    "ibot_vit_b16": (125_114, 4e-3, 25_023, 0.65**13),
    "deit_vit_b16": (375_342, 1e-3, 6256, 1.0),
}
SIZES = {"b16": "vit_base_patch16_224", "l16": "vit_large_patch16_224", "h14": "vit_huge_patch14_224"}


@pytest.mark.parametrize("path", [path for path in PRESETS if program_of(path) == "finetune"], ids=lambda path: path.stem)
def test_a_fine_tuning_preset_comes_to_its_published_numbers(path: Path, tmp_path: Path):
    """The plan that ``--plan`` prints, from an export of the size that the preset is for, on ImageNet-1k."""
    name = SIZES.get(path.stem.rpartition("_")[2], "vit_tiny_patch16_224")
    section = {"name": name, "image_size": 224}
    facts = {"architecture": name, "arguments": {}, "image_size": [224, 224], "mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "encoder.json").write_text(json.dumps(facts | {"pooling": "mean", "encoder": section}))
    (tmp_path / "encoder.safetensors").touch()
    statistics = ["data.mean=[0.5, 0.5, 0.5]", "data.std=[0.5, 0.5, 0.5]"]
    config = load(FinetuneConfig, path, [f"encoder={tmp_path}", *statistics, "micro_batch=1", "launch.device=cpu"])
    teacher = SimpleNamespace(parameters=list) if config.teacher else None
    task = outline(lambda: build_task(config, 1000, teacher))
    plan = make_plan(config, task, SimpleNamespace(num_samples=IMAGENET, ignored=0, by_chunk=False))
    groups = {group.rule.name: group for group in group_parameters(task)}
    assert plan.memory["optimiser"] == 4 * len(MOMENTS[config.optim.name]) * sum(group.size for group in groups.values())
    if path.stem in FINETUNE:
        stem = groups["stem.decay"].rule.lr_scale
        found = (plan.steps, plan.lr, plan.warmup_steps, stem)
        assert found == pytest.approx(FINETUNE[path.stem], rel=1e-12)
        assert [line for line in path.read_text().splitlines() if line.startswith("#") and "Published" in line]


def test_every_fine_tuning_preset_for_imagenet_has_its_numbers():
    assert {path.stem for path in PRESETS if program_of(path) == "finetune"} - {"demo", "cifar10"} == set(FINETUNE)


@pytest.mark.parametrize("stem", ["vit_b16", "moco_v3_vit_b16", "ibot_vit_b16", "deit_vit_b16", "mae_vit_l16", "mae_vit_h14"])
def test_each_number_of_a_recipe_carries_its_source(stem: str):
    """A line with a number says where it is from, but for what is ours: evaluation and lines on the console."""
    for line in (CONFIGS / "finetune" / f"{stem}.yaml").read_text().splitlines():
        own = line.startswith(("#", "run:", "log:", "base:", "test: {crop_pct: 1.0, every"))
        assert own or not re.search(r"[:{] ?[\[\d]", line) or re.search(r"#\s+(\[\w+\]|paper|FINETUNE\.md)", line), line


def test_names_of_runs_differ():
    names = [load(PROGRAMS[program_of(path)], path).run.name for path in PRESETS]
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
