"""Fine-tuning, from an exported encoder to a classifier: which decisions are made, and in which order."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from finetune.classes import names_of, open_classes, open_test
from finetune.config import FinetuneConfig
from finetune.encoders import origin_of
from finetune.labels import balance, choose_labelled
from finetune.seeds import run_seeds
from finetune.several import SeveralEvaluation
from finetune.teacher import open_teacher, tell_teacher
from finetune.watch import Evaluation, onnx_command, tested_size
from vitssl import dist
from vitssl.command import Command
from vitssl.data.augment import RandAugment, erasing, mixer, rand_augment
from vitssl.data.sources import Several, Source
from vitssl.data.transforms import check_channels
from vitssl.errors import ConfigError, first_of
from vitssl.models.encoder import Encoder
from vitssl.models.heads import head_like
from vitssl.models.teacher import Teacher
from vitssl.objectives.classify import Classify
from vitssl.objectives.distilled import Distilled
from vitssl.report import Report
from vitssl.train.export import encoder_like, fill_encoder, newest_export, read_export, read_facts
from vitssl.train.folder import begun_with, run_folder
from vitssl.train.planning import batch_split, outline
from vitssl.train.session import begin_session, show_plan
from vitssl.train.taught import note_teacher, refuse_other_teacher
from vitssl.views import View


def run(config: FinetuneConfig, command: Command) -> int:
    """The program after its command line. Returns the exit code."""
    if config.seeds > 1:
        return run_seeds(config, command, run_once)
    run_once(config, command)
    return 0


def run_once(config: FinetuneConfig, command: Command, *, last: bool = True) -> bool:
    """One run; returns whether it is finished. ``last``: of this process, which then leaves the others."""
    report = Report(None if command.flags else run_folder(config), active=dist.rank() == 0)
    asked = config.encoder
    if asked == "newest":
        begun = (begun_with(run_folder(config)) or {}).get("encoder")  # a run goes on with the one it began with
        config = config.model_copy(update={"encoder": begun or str(newest_export(config.run.dir))})
    config = with_own_statistics(config)
    source = open_training(config, report)
    classes = names_of(source)
    teacher = open_teacher(config, classes)

    def build() -> Classify:
        return build_task(config, len(classes), teacher)

    def open_data(report: Report) -> Source:
        return source

    def fill(task: Classify) -> None:
        if config.weights == "pretrained":
            fill_encoder(task.encoder, origin_of(config.encoder), new_register=config.has_token)
        if task.twin is not None:
            task.twin.restart()

    shape = outline(build)
    spec = shape.encoder.spec
    augment = _augment(config, shape)
    if config.onnx:
        import vitssl.interop.onnx  # noqa: F401 - says now, and not after the training, that it is not installed
    if "--plan" in command.flags:
        show_plan(config, build, open_data, report)
        return False
    tested_size(config.test.image_size, spec)  # a size that cannot be is refused before anything is written
    if teacher is not None:
        tell_teacher(config, teacher, spec, report)
        refuse_other_teacher(run_folder(config), "teacher", config.teacher.name, teacher)
    images = open_test(config, source, report.say)
    session = begin_session(config, build, open_data, report, fill=fill)
    if session is None:
        if asked == "newest" and (newer := str(newest_export(config.run.dir))) != config.encoder:
            report.say(f"it began from {config.encoder}; {newer} is newer: take another run.name for that")
        if config.onnx and not (run_folder(config) / "export" / "onnx").is_dir():
            report.say(f"onnx=true writes it at the end of a run; now run:  {onnx_command(run_folder(config))}")
        return True
    if teacher is not None and session.engine.main:
        note_teacher(session.folder, config.teacher.name, teacher)
    tell_missing_classes(source, classes, report)
    test = (SeveralEvaluation if config.labels == "several" else Evaluation)(session, images, classes=classes)
    view = View(size=spec.image_size, scale=config.augment.scale, flip=config.augment.flip)
    tell_short_average(config, session.plan.steps, report)
    reached = session.start
    if test.ended:
        report.say(f"{session.folder} ended at step {reached:,} by test.patience={config.test.patience}; null goes on")
    else:
        reached = session.fit([view], channels=spec.channels, labels=True, augment=augment, events=[test.event()])
    finished = test.ended or reached == session.plan.steps
    if finished:
        if config.onnx and session.engine.main:
            write_onnx(session.folder)
        test.finish()
    else:
        session.tell_stopped(reached, command.typed("finetune", launched=dist.world() > 1))
    session.engine.end(leave=last or not finished)
    return finished


def write_onnx(folder: Path) -> None:
    """The last classifier of a run as ONNX, in the place of an earlier one. Raises CheckpointError."""
    from vitssl.interop.onnx import export_onnx

    shutil.rmtree(folder / "export" / "onnx", ignore_errors=True)
    export_onnx(folder / "export" / "onnx", *read_export(folder / "export" / "last", "classifier"), run=folder)


def with_own_statistics(config: FinetuneConfig) -> FinetuneConfig:
    """The config with the mean and deviation that the encoder was pretrained with, where it names none."""
    facts, data = read_facts(origin_of(config.encoder)), config.data
    own = {"mean": data.mean or tuple(facts["mean"]), "std": data.std or tuple(facts["std"])}
    return config.model_copy(update={"data": data.model_copy(update=own)})


def open_training(config: FinetuneConfig, report: Report) -> Source:
    """The labelled images to train on: all or a class-balanced few, their classes as they are or drawn evenly."""
    source = open_classes(config, report.waiting("preparing data"))
    source = choose_labelled(source, labelled=config.labelled, shots=config.shots, seed=config.seed)
    return balance(source, config.balance, cached=config.data.cache is not None)


def tell_short_average(config: FinetuneConfig, steps: int, report: Report) -> None:
    """Warn where an average still remembers more of the beginning than of the training."""
    if config.ema is not None and (horizon := 1 / (1 - config.ema)) > steps:
        report.say(
            f"warning: ema={config.ema} averages over about {horizon:,.0f} steps, and the run has {steps:,}: the average stays"
            " near where it began; lower ema, or set it to null",
            style="yellow",
        )


def tell_missing_classes(source: Source, classes: tuple[str, ...], report: Report) -> None:
    """Warn of classes that are named and that no training image has."""
    counts = source.counts() if isinstance(source, Several) else np.bincount(source.label_array(), minlength=len(classes))
    if missing := [name for name, count in zip(classes, counts, strict=True) if not count]:
        report.say(
            f"warning: {len(missing):,} of {len(classes):,} classes have no image to train on ({first_of(missing)}), so they"
            f" are never told; add images, or take them out, as label_map={{{missing[0]}: null}} does",
            style="yellow",
        )


def build_task(config: FinetuneConfig, num_classes: int, teacher: Teacher | None = None) -> Classify:
    """An encoder like the exported one, with a fresh head, and where the config distils, its ``teacher``."""
    encoder, facts = like_the_export(config)
    pooling = config.head.pooling or facts["pooling"]
    norm = encoder.drop_norm() if pooling == "mean" and config.mode != "linear" else False
    begin = {"init": config.head.init, "std": config.head.std}
    said = {"hidden": config.head.hidden, "distilled": config.has_token}
    head = head_like(said, encoder.spec.dim, num_classes, pooling=pooling, norm=norm, **begin)
    encoder.spec.refuse_pooling(pooling)
    check_channels(encoder.spec.channels, arrays=config.data.arrays)
    augment = config.augment
    if augment.rand_augment and encoder.spec.channels not in (1, 3):
        raise ConfigError(f"augment.rand_augment: is for 1 or 3 channels, not {encoder.spec.channels}; set it to null")
    distils, kind = config.teacher, Classify
    own: dict[str, Any] = {}
    if distils is not None:
        kind = Distilled
        own = {"teacher": teacher, **{key: getattr(distils, key) for key in ("kind", "temperature", "alpha")}}
    return kind(
        encoder,
        head,
        mean=config.data.mean,
        std=config.data.std,
        loss=config.loss,
        smoothing=config.smoothing,
        mixup=mixer(augment.mixup, augment.cutmix, switch=augment.switch, num_classes=num_classes),
        erasing=erasing(augment.erasing),
        mode=config.mode,
        blocks=config.blocks,
        layer_decay=config.optim.layer_decay or 1.0,
        patch_lr=config.optim.patch_lr,
        decay=config.optim.decay,
        ema=config.ema,
        **own,
    )


def _augment(config: FinetuneConfig, shape: Classify) -> RandAugment | None:
    """What is done to pixels on the way in. Raises ConfigError for a policy that is none, and for mixing an odd number."""
    micro_batch, _ = batch_split(config, shape)
    if shape.mixup is not None and micro_batch % 2:
        raise ConfigError(
            f"augment.mixup and augment.cutmix mix a forward in pairs, and micro_batch={micro_batch}; make it even"
        )
    policy = config.augment.rand_augment
    return rand_augment(policy, mean=config.data.mean, size=min(shape.encoder.spec.image_size)) if policy else None


def like_the_export(config: FinetuneConfig) -> tuple[Encoder, dict[str, Any]]:
    """The encoder that is trained, with fresh weights, and the export's facts. A distillation token is one register more, the
    last, which begins as DeiT's does: N(0, 0.02)."""
    path, changes = origin_of(config.encoder), {"drop_path": config.drop_path}
    if config.image_size is not None:
        changes["image_size"] = config.image_size
    if not config.has_token:
        return encoder_like(path, **changes)
    with torch.device("meta"):
        spec = encoder_like(path)[0].spec
        changes["registers"] = spec.prefix - spec.class_token + 1
        try:
            encoder_like(path, registers=changes["registers"])
        except ConfigError as error:
            raise ConfigError(f"teacher.token=true: there is no place for it ({error}); take teacher.token=false") from None
    encoder, facts = encoder_like(path, **changes)
    nn.init.trunc_normal_(encoder.vit.reg_token.data[:, -1], std=0.02)
    return encoder, facts
