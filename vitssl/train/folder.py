"""A run on disk: its folder, what it was started with, and whether what is asked now is the same run."""

import fcntl
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from vitssl import dist
from vitssl.config import build, difference, dump
from vitssl.data import ledger, quarantine
from vitssl.data.sources import Source, same_samples
from vitssl.data.stores import shown, without_secrets
from vitssl.errors import CheckpointError, ConfigError, DataError
from vitssl.plan import Plan
from vitssl.report import Report
from vitssl.sections import CHANGEABLE, ProgramConfig
from vitssl.train import checkpoint
from vitssl.train.checkpoint import Saved

_locks: list[int] = []  # descriptors: closing one would end its lock
ROLLBACKS = "rollbacks.jsonl"
LEDGER = "ledger"
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


def recorded(config: ProgramConfig) -> dict[str, Any]:
    """What is written down of a config: its values without the passwords and signatures of its urls."""
    return _texts(config.model_dump(mode="json"), without_secrets)


def refuse_another_run(folder: Path, config: ProgramConfig, report: Report) -> None:
    """Raise ConfigError, showing the difference, where the folder holds a run of another config."""
    values = begun_with(folder)
    if values is None:
        report.say(
            f"warning: {folder / 'config.yaml'} is damaged or missing, so whether this is the same run is unknown; going on",
            style="yellow",
        )
    known = _with_defaults(values or {}, config)
    then, now = (_texts(each, shown) for each in (known, recorded(config)))  # a new signature is no other run
    differing = difference(then, now, ignore=CHANGEABLE) if values else []
    if differing:
        onward = " (from this one's export with init.weights=...)" if "weights" in type(config.init).model_fields else ""
        raise ConfigError(
            f"{folder} holds a run of another config ({'; '.join(differing[:4])}{'; ...' if len(differing) > 4 else ''});"
            f" take the old values, or begin another run.name{onward}"
        )


def _with_defaults(values: dict[str, Any], config: ProgramConfig) -> dict[str, Any]:
    """Recorded values with the keys that came with a later version: their defaults are what the earlier one did."""
    try:
        return build(type(config), values, where="config.yaml").model_dump(mode="json")
    except ConfigError:  # a key that is gone, or has other values now: then the difference is shown
        return values


def starting_point(folder: Path, config: ProgramConfig, report: Report) -> tuple[Saved | None, Path]:
    """(checkpoint, the run it is of) to continue from: this folder's newest whole one, else ``init.resume``'s, else none.

    Raises ConfigError where the other run is one of another config.
    """

    def warn(text: str) -> None:
        report.say(f"warning: {text}", style="yellow")

    saved, resume = checkpoint.load_newest(folder / "checkpoints", tell=warn), config.init.resume
    if saved is not None or resume is None:
        return saved, folder
    refuse_another_run(resume, config, report)
    saved = checkpoint.load_newest(resume / "checkpoints", tell=warn)
    if saved is None:
        raise CheckpointError(f"init.resume={resume}: there is no checkpoint in {resume / 'checkpoints'}")
    return saved, resume


def refuse_other_data(saved: Saved, source: Source, *, where: Path) -> None:
    """Raise DataError where the samples are not those that the checkpoint was made with: their order would be another."""
    then = saved.facts["data"]
    if not same_samples(then["fingerprint"], source.fingerprint):
        same = then["samples"] == source.num_samples
        change = "other images, as many as then" if same else f"{then['samples']:,} images then, {source.num_samples:,} now"
        raise DataError(
            f"{source.name}: is not the data that {where} was begun on ({change}); put it back, or begin a new run from that"
            " one's export"
        )


def refuse_disagreement(source: Source, *, micro_batch: int) -> None:
    """Raise where the processes of a run do not mean the same: they would train on samples twice, or wait for each other."""
    prints = dist.gather_lists([source.fingerprint])
    other = next((rank for rank, each in enumerate(prints) if not same_samples(prints[0], each)), None)
    if other is not None:
        raise DataError(f"{source.name}: process {other} sees other data than process 0; give all machines the same")
    sizes = dist.gather_lists([micro_batch])
    if len(set(sizes)) > 1:
        raise ConfigError(
            f"micro_batch: what fits is {min(sizes)} on one process and {max(sizes)} on another; set micro_batch={min(sizes)}"
        )


def occupy(folder: Path) -> None:
    """Keep other programs out of a run's folder for as long as this process lives. Raises ConfigError if one is in it.

    A record lock: it ends with its process, however that ends, and forked loader processes do not inherit it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    _locks.append(descriptor)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ConfigError(f"{folder}: another program is training in it now; wait for it, or take another run.name") from None
    except OSError:
        return  # a file system without locks


def read_rollbacks(folder: Path, step: int) -> list[dict[str, int]]:
    """{step, at, skipped, times} of each time that a run was set back, as far as they led to ``step``."""
    path = folder / ROLLBACKS
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["step"] <= step]


def begin(folder: Path, config: ProgramConfig, plan: Plan, *, step: int, rollbacks: Sequence[Mapping[str, int]] = ()) -> None:
    """Write config, plan and environment, and cut the logs back to ``step``. The main process calls it.

    ``rollbacks`` are those that led there, of this run or of the one it continues.
    """
    _replace(folder / "config.yaml", dump(type(config).model_validate(recorded(config))))
    plan.save(folder / "plan.json")
    _replace(folder / "environment.json", json.dumps(environment(), indent=1) + "\n")
    for name in ("metrics.jsonl", "probes.jsonl", "health.jsonl", quarantine.FILE):
        _cut(folder / name, step)
    if rollbacks or (folder / ROLLBACKS).exists():
        _replace(folder / ROLLBACKS, "".join(json.dumps(row) + "\n" for row in rollbacks))
    skipped = sum(each["skipped"] for each in rollbacks)
    ledger.cut(folder / LEDGER, step * config.batch_size + skipped)


def environment() -> dict[str, Any]:
    """Versions, hardware and the command: what a number of this run was measured on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "command": [Path(sys.argv[0]).parent.name or sys.argv[0], *map(without_secrets, sys.argv[1:])],
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


def _texts(values: Any, change: Callable[[str], str]) -> Any:
    """The same values with each text changed."""
    if isinstance(values, Mapping):
        return {key: _texts(value, change) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_texts(value, change) for value in values]
    return change(values) if isinstance(values, str) else values


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a row that a killed process left half-written
