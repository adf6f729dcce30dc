"""The teacher of a distillation: found by its name, loaded, and held against the classes that are to be learnt."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from finetune.config import FinetuneConfig, TeacherConfig
from vitssl.errors import ConfigError, first_of
from vitssl.interop.files import read_tensors
from vitssl.interop.ours import classifier_of
from vitssl.models.encoder import EncoderSpec
from vitssl.models.state import digest_of
from vitssl.models.teacher import Teacher, timm_network
from vitssl.report import Report
from vitssl.train import checkpoint
from vitssl.train.export import last_part, read_export

FILE = "teacher.json"


def open_teacher(config: FinetuneConfig, classes: tuple[str, ...]) -> Teacher | None:
    """The config's teacher of these classes, or None. Raises ConfigError and CheckpointError, each in one line."""
    asked = config.teacher
    if asked is None:
        return None
    if asked.token and config.mode != "full":
        raise ConfigError(f"teacher.token=true trains a token, which mode={config.mode} freezes; take mode=full")
    if asked.token and config.head.hidden is not None:
        raise ConfigError(f"teacher.token=true and head.hidden={config.head.hidden} exclude each other; keep one of them")
    network, facts = _ours(asked) if _is_ours(asked.name) else _timm(asked)
    if facts["num_classes"] != len(classes):
        raise ConfigError(
            f"teacher.name={asked.name}: tells {facts['num_classes']:,} classes apart and the training data has"
            f" {len(classes):,}; take a teacher of the same classes"
        )
    facts["columns"] = columns_of(asked.name, facts.pop("classes", None), classes)
    if asked.image_size is not None:
        size = asked.image_size
        facts["size"] = (size, size) if isinstance(size, int) else size
    return Teacher(network, **facts)


def tell_teacher(config: FinetuneConfig, teacher: Teacher, spec: EncoderSpec, report: Report) -> None:
    """Say who teaches and what it is shown. Raises ConfigError where it was made for other channels."""
    if teacher.channels != spec.channels:
        raise ConfigError(
            f"teacher.name={config.teacher.name}: looks at {teacher.channels} channels, and encoder.channels={spec.channels}"
        )
    own, seen = ("x".join(map(str, size)) for size in (teacher.size, spec.image_size))
    size = "as they are" if own == seen else f"resized from {seen} to {own}, bicubic (teacher.image_size)"
    report.say(
        f"teacher {config.teacher.name}: {config.teacher.kind} distillation, {config.teacher.alpha:.0%} of the loss; it sees"
        f" the student's images, {size}"
    )


def refuse_other_teacher(folder: Path, config: FinetuneConfig, teacher: Teacher) -> None:
    """Raise ConfigError where the run in ``folder`` was begun with other weights under the same name."""
    file = folder / FILE
    known = json.loads(file.read_text())["weights"] if file.is_file() and checkpoint.found(folder / "checkpoints") else None
    if known not in (None, digest_of(teacher.state_dict())):
        raise ConfigError(
            f"teacher.name={config.teacher.name}: has other weights than when {folder} was begun; put them back, or take"
            " another run.name"
        )


def note_teacher(folder: Path, config: FinetuneConfig, teacher: Teacher) -> None:
    """Write down whose answers this run learns from."""
    words = {"name": config.teacher.name, "weights": digest_of(teacher.state_dict())}
    (folder / FILE).write_text(json.dumps(words, indent=1) + "\n")


def _is_ours(name: str) -> bool:
    folder = Path(name)
    return folder.exists() and last_part(folder)[1] == "classifier"


def _ours(asked: TeacherConfig) -> tuple[nn.Module, dict[str, Any]]:
    if asked.weights is not None:
        raise _two_weights(asked)
    state, facts = read_export(*last_part(Path(asked.name)))
    if facts.get("labels") == "several":
        raise ConfigError(
            f"teacher.name={asked.name}: tells several labels of an image, and distillation is of one; take another"
        )
    known = {"mean": facts["mean"], "std": facts["std"], "size": tuple(facts["image_size"])}
    return classifier_of(state, facts), known | {"classes": (names := tuple(facts["classes"])), "num_classes": len(names)}


def _timm(asked: TeacherConfig) -> tuple[nn.Module, dict[str, Any]]:
    name = asked.name
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ConfigError(f"teacher.name={name}: holds neither a classifier of ours nor a timm model's config.json")
        name = f"local-dir:{name}"
    if name.startswith("local-dir:") and asked.weights is not None:
        raise _two_weights(asked)
    network, known = timm_network(name, None if asked.weights is None else read_tensors(asked.weights))
    size = tuple(known["input_size"][-2:])
    return network, {"mean": known["mean"], "std": known["std"], "size": size, "num_classes": network.num_classes}


def _two_weights(asked: TeacherConfig) -> ConfigError:
    return ConfigError(f"teacher.weights={asked.weights}: {asked.name} has weights of its own; leave them out")


def columns_of(name: str, theirs: tuple[str, ...] | None, classes: tuple[str, ...]) -> list[int] | None:
    """Where the teacher tells each class, by names; None where the order is the same or nobody knows names."""
    numbers = tuple(map(str, range(len(classes))))
    if theirs is None or theirs == classes or numbers in (theirs, classes):
        return None
    if missing := [each for each in classes if each not in theirs]:
        raise ConfigError(
            f"teacher.name={name}: does not know {len(missing)} of the classes ({first_of(missing)}); take another teacher"
        )
    return [theirs.index(each) for each in classes]
