"""Fine-tuning, from an exported encoder to a classifier: which decisions are made, and in which order."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from finetune.config import FinetuneConfig
from vitssl import dist
from vitssl.command import Command
from vitssl.data.augment import erasing, mixer, rand_augment
from vitssl.data.feed import evaluation_samples, open_configured, share
from vitssl.data.sources import Joined, Source, label_like, take_labelled
from vitssl.data.transforms import check_channels
from vitssl.errors import ConfigError, DataError
from vitssl.models.heads import ClassificationHead
from vitssl.objectives.classify import Classify
from vitssl.report import Report
from vitssl.train.evaluate import evaluate
from vitssl.train.export import encoder_like, fill_encoder, newest_export, read_facts, write_export
from vitssl.train.folder import begun_with, run_folder
from vitssl.train.loop import Event
from vitssl.train.session import Session, begin_session, show_plan
from vitssl.views import View


def run(config: FinetuneConfig, command: Command) -> int:
    """The program after its command line. Returns the exit code."""
    report = Report(None if command.flags else run_folder(config), active=dist.rank() == 0)
    asked = config.encoder
    if asked == "newest":
        begun = (begun_with(run_folder(config)) or {}).get("encoder")  # a run goes on with the one it began with
        config = config.model_copy(update={"encoder": begun or str(newest_export(config.run.dir))})
    config = with_own_statistics(config)
    source = open_training(config, report)
    classes = source.classes or tuple(map(str, range(int(source.label_array().max()) + 1)))

    def build() -> Classify:
        return build_task(config, len(classes))

    def open_data(report: Report) -> Source:
        return source

    def fill(task: Classify) -> None:
        if config.weights == "pretrained":
            fill_encoder(task.encoder, Path(config.encoder))

    if "--plan" in command.flags:
        show_plan(config, build, open_data, report)
        return 0
    images = label_like(open_configured(config.test, key="test"), source)
    session = begin_session(config, build, open_data, report, fill=fill)
    if session is None:
        if asked == "newest" and (newer := str(newest_export(config.run.dir))) != config.encoder:
            report.say(f"it began from {config.encoder}; {newer} is newer: take another run.name for that")
        return 0
    test = Evaluation(session, images, classes=classes)
    spec = session.engine.task.encoder.spec
    view = View(size=spec.image_size, scale=config.augment.scale, flip=config.augment.flip)
    policy = config.augment.rand_augment
    augment = rand_augment(policy, mean=config.data.mean, size=min(spec.image_size)) if policy else None
    reached = session.fit([view], channels=spec.channels, labels=True, augment=augment, events=[test.event()])
    if reached < session.plan.steps:
        session.tell_stopped(reached, command.typed("finetune", launched=dist.world() > 1))
    else:
        test.finish()
    session.engine.end()
    return 0


def with_own_statistics(config: FinetuneConfig) -> FinetuneConfig:
    """The config with the mean and deviation that the encoder was pretrained with, where it names none."""
    facts, data = read_facts(Path(config.encoder)), config.data
    own = {"mean": data.mean or tuple(facts["mean"]), "std": data.std or tuple(facts["std"])}
    return config.model_copy(update={"data": data.model_copy(update=own)})


def open_training(config: FinetuneConfig, report: Report) -> Source:
    """The labelled images to train on, all or a class-balanced few."""
    source = open_configured(config.data, key="data", progress=report.waiting("preparing data"))
    labels = source.label_array()
    if labels is None:
        raise DataError(f"{source.name}: fine-tuning needs a label for every image (.cls members, or class folders)")
    different, largest = len(np.unique(labels)), int(labels.max())
    if source.classes is None and largest >= max(1000, 10 * different):
        raise DataError(f"{source.name}: has {different:,} different labels, and one is {largest:,}; number classes from 0 on")
    if config.labelled and isinstance(source, Joined):
        raise ConfigError("labelled and data.sources exclude each other: few labels are balanced by class, not by weight")
    return take_labelled(source, num=config.labelled, seed=config.seed) if config.labelled else source


def build_task(config: FinetuneConfig, num_classes: int) -> Classify:
    """An encoder like the exported one, with a fresh head."""
    changes: dict[str, Any] = {"drop_path": config.drop_path}
    if config.image_size is not None:
        changes["image_size"] = config.image_size
    encoder, facts = encoder_like(Path(config.encoder), **changes)
    pooling = config.head.pooling or facts["pooling"]
    norm = encoder.drop_norm() if pooling == "mean" and config.mode == "full" else False
    head = ClassificationHead(
        encoder.spec.dim, num_classes, pooling=pooling, norm=norm, init=config.head.init, std=config.head.std
    )
    encoder.spec.refuse_pooling(pooling)
    check_channels(encoder.spec.channels, arrays=config.data.arrays)
    augment = config.augment
    if augment.rand_augment and encoder.spec.channels not in (1, 3):
        raise ConfigError(f"augment.rand_augment: is for 1 or 3 channels, not {encoder.spec.channels}; set it to null")
    return Classify(
        encoder,
        head,
        mean=config.data.mean,
        std=config.data.std,
        smoothing=config.smoothing,
        mixup=mixer(augment.mixup, augment.cutmix, switch=augment.switch, num_classes=num_classes),
        erasing=erasing(augment.erasing),
        mode=config.mode,
        layer_decay=config.optim.layer_decay or 1.0,
    )


class Evaluation:
    """Accuracy on the test images on the way and at the end; the best classifier and the last are kept."""

    def __init__(self, session: Session, images: Source, *, classes: tuple[str, ...]) -> None:
        self.session, self.classes = session, classes
        spec = session.engine.task.encoder.spec
        view = View(size=spec.image_size, resize=round(min(spec.image_size) / session.config.test.crop_pct))
        self.samples = evaluation_samples(images, session.config.data, [view], channels=spec.channels, labels=True)

    def event(self) -> Event:
        """The evaluation as something the loop does."""
        return Event(every=self.session.steps(self.session.config.test.every), act=self.act)

    def act(self, step: int) -> None:
        """Measure, write the row, and keep the classifier if none was better."""
        session = self.session
        result = evaluate(session.engine, share(self.samples, tell=session.report.say), seed=session.config.seed)
        best = max((row["top1"] for row in self.rows()), default=-1.0)
        session.report.scalars({f"test/{name}": value for name, value in result.items()}, step)
        session.report.rows("probes.jsonl", [{"step": step, **result, "images": len(self.samples)}])
        session.report.say(f"step {step:,}  test {in_words(result)}")
        if session.engine.main:
            self.keep("last", step, result)
            if result["top1"] > best:
                self.keep("best", step, result)

    def keep(self, which: str, step: int, result: dict[str, float]) -> None:
        """Write the classifier as timm's own: ``export/<which>/classifier.safetensors`` and ``.json``."""
        session, task = self.session, self.session.engine.task
        facts = {
            "architecture": task.encoder.architecture,
            "arguments": task.encoder.arguments | task.head.arguments,
            "image_size": list(task.encoder.spec.image_size),
            "mean": list(session.config.data.mean),
            "std": list(session.config.data.std),
            "pooling": task.head.pooling,
            "classes": list(self.classes),
            "run": str(session.folder),
            "step": step,
            "top1": result["top1"],
        }
        state = task.encoder.state() | task.head.state()
        write_export(session.folder / "export" / which, "classifier", state, facts)

    def rows(self) -> list[dict[str, Any]]:
        """Every evaluation of the run so far."""
        path = self.session.folder / "probes.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def finish(self) -> None:
        """Say what was made, where it lies, and how good it is."""
        self.session.report.rest()
        session, rows = self.session, self.rows()
        last, best = rows[-1], max(rows, key=lambda row: row["top1"])
        report = [
            ("test", f"{in_words(last)} of {len(self.samples):,} images after the last step"),
            ("best", f"{best['top1']:.2%} at step {best['step']:,} (chosen on the same images)"),
            ("classifier", f"{session.folder / 'export' / 'last' / 'classifier.safetensors'}, a plain timm state"),
        ]
        config = session.config
        origin = config.encoder if config.weights == "pretrained" else f"scratch ({config.encoder} untouched)"
        session.report.pairs(f"fine-tuned on {session.source.num_samples:,} labelled images from {origin}", report)


def in_words(result: dict[str, float]) -> str:
    """An evaluation in one phrase."""
    return f"top-1 {result['top1']:.2%}  top-5 {result['top5']:.2%}  loss {result['loss']:.4f}"
