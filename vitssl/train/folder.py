"""A run on disk: its folder, what it was started with, and whether what is asked now is the same run."""

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from vitssl import dist
from vitssl.config import difference, dump
from vitssl.errors import CheckpointError, ConfigError
from vitssl.plan import Plan
from vitssl.report import Report
from vitssl.sections import CHANGEABLE, ProgramConfig
from vitssl.train import checkpoint
from vitssl.train.checkpoint import Saved

PACKAGES = ("vitssl", "torch", "torchvision", "timm", "accelerate", "deepspeed", "webdataset", "numpy", "pillow", "safetensors")


def run_folder(config: ProgramConfig) -> Path:
    return config.run.dir / config.run.name


def begun_with(folder: Path) -> dict[str, Any] | None:
    """The config of the run that a folder holds: {} where no checkpoint was written yet, None where it cannot be read."""
    if not checkpoint.found(folder / "checkpoints"):
        return {}
    try:
        values = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return values if isinstance(values, dict) and values else None


def refuse_another_run(folder: Path, config: ProgramConfig, report: Report) -> None:
    """Raise ConfigError, showing the difference, where the folder holds a run of another config."""
    values = begun_with(folder)
    if values is None:
        report.say(
            f"warning: {folder / 'config.yaml'} is damaged or missing, so whether this is the same run is unknown; going on",
            style="yellow",
        )
    differing = difference(values, config.model_dump(mode="json"), ignore=CHANGEABLE) if values else []
    if differing:
        raise ConfigError(
            f"{folder} holds a run of another config ({'; '.join(differing[:4])}{'; ...' if len(differing) > 4 else ''});"
            " give this one another run.name, or take the old values"
        )


def starting_point(folder: Path, resume: Path | None, report: Report) -> tuple[Saved | None, str]:
    """(checkpoint, where) to continue from: this folder's newest whole one, else another run's, else none."""
    saved = checkpoint.load_newest(folder / "checkpoints", tell=lambda text: report.say(f"warning: {text}", style="yellow"))
    if saved is not None:
        return saved, str(folder)
    if resume is None:
        return None, ""
    saved = checkpoint.load_newest(
        Path(resume) / "checkpoints", tell=lambda text: report.say(f"warning: {text}", style="yellow")
    )
    if saved is None:
        raise CheckpointError(f"init.resume={resume}: there is no checkpoint in {Path(resume) / 'checkpoints'}")
    return saved, str(resume)


def begin(folder: Path, config: ProgramConfig, plan: Plan, *, step: int) -> None:
    """Write config, plan and environment, and cut the logs back to ``step``. The main process calls it."""
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "config.yaml", dump(config))
    plan.save(folder / "plan.json")
    _replace(folder / "environment.json", json.dumps(environment(), indent=1) + "\n")
    for name in ("metrics.jsonl", "probes.jsonl"):
        _cut(folder / name, step)


def environment() -> dict[str, Any]:
    """Versions, hardware and the command: what a number of this run was measured on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "command": [Path(sys.argv[0]).parent.name or sys.argv[0], *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processes": dist.world(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "packages": versions,
    }


def _cut(path: Path, step: int) -> None:
    """Drop the rows after ``step``, all of them where that is 0: a continued run writes them anew."""
    if path.exists():
        rows = [line for line in path.read_text(errors="replace").splitlines() if step and _step_of(line) <= step]
        _replace(path, "".join(line + "\n" for line in rows))


def _replace(path: Path, text: str) -> None:
    """Write under another name, then rename: a killed process leaves the old file or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a row that a killed process left half-written
