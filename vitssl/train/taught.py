"""Whose answers a run learns from: written beside it, so that it does not go on with another teacher of the same name."""

import json
from pathlib import Path

from vitssl.errors import ConfigError
from vitssl.models.state import digest_of
from vitssl.models.teacher import Teacher
from vitssl.train import checkpoint

FILE = "teacher.json"


def refuse_other_teacher(folder: Path, key: str, name: str, teacher: Teacher) -> None:
    """Raise ConfigError where the run in ``folder`` was begun with other weights under the same name."""
    file = folder / FILE
    known = json.loads(file.read_text())["weights"] if file.is_file() and checkpoint.found(folder / "checkpoints") else None
    if known not in (None, digest_of(teacher.state_dict())):
        raise ConfigError(
            f"{key}.name={name}: has other weights than when {folder} was begun; put them back, or take another run.name"
        )


def note_teacher(folder: Path, name: str, teacher: Teacher) -> None:
    """Write down whose answers this run learns from."""
    (folder / FILE).write_text(json.dumps({"name": name, "weights": digest_of(teacher.state_dict())}, indent=1) + "\n")
