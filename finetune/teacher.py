"""The teacher of a distillation: found by its name, loaded, and held against the classes that are to be learnt."""

from finetune.config import FinetuneConfig
from vitssl.errors import ConfigError, first_of
from vitssl.interop.taught import named_classifier
from vitssl.models.spec import EncoderSpec
from vitssl.models.teacher import Teacher
from vitssl.report import Report
from vitssl.train.export import exported_classifier


def open_teacher(config: FinetuneConfig, classes: tuple[str, ...]) -> Teacher | None:
    """The config's teacher of these classes, or None. Raises ConfigError and CheckpointError, each in one line."""
    asked = config.teacher
    if asked is None:
        return None
    if asked.token and config.mode != "full":
        raise ConfigError(f"teacher.token=true trains a token, which mode={config.mode} freezes; take mode=full")
    if asked.token and config.head.hidden is not None:
        raise ConfigError(f"teacher.token=true and head.hidden={config.head.hidden} exclude each other; keep one of them")
    network, facts = named_classifier("teacher", asked.name, asked.weights, exported_classifier(asked.name))
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
    report.say(
        f"teacher {config.teacher.name}: {config.teacher.kind} distillation, {config.teacher.alpha:.0%} of the loss; it sees"
        f" {teacher.sees(spec.image_size)} (teacher.image_size)"
    )


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
