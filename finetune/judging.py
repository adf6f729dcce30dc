"""Frozen encoders, their features on labelled sets, and what each protocol makes of them."""

import datetime
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.encoders import open_encoder
from finetune.evaluate import FINETUNE, EvaluateConfig, SetConfig
from finetune.tuned import SOURCE, Judging, Labelled, finetuned, settings_of
from vitssl import dist
from vitssl.data.feed import open_configured, refuse_training_settings
from vitssl.data.layout import choose_workers
from vitssl.data.sources import Source, label_like, refuse_stray
from vitssl.errors import DataError
from vitssl.models.encoder import Encoder
from vitssl.models.state import digest_of
from vitssl.probes.protocols import LINEAR, SOURCES, Judged, Split, judge, needed, wilson
from vitssl.report import Report
from vitssl.train.export import newest_export
from vitssl.train.frozen import Extraction, frozen_features
from vitssl.views import View

Facts = dict[str, Any]
Kept = tuple[dict[str, np.ndarray], np.ndarray]  # (mapped files, rows that could be used)


def evaluate(config: EvaluateConfig, report: Report) -> tuple[list[dict[str, Any]], Facts]:
    """A row for every data set, encoder, protocol, setting and seed, and what they are rows of, on the first process; others
    help to extract features and return no row.

    Raises ConfigError, DataError and CheckpointError.
    """
    dist.begin()
    if FINETUNE in config.protocol:
        settings_of(config)
    sets = [_open(name, each, config, report) for name, each in config.sets.items()]
    names = [config.encoder] if isinstance(config.encoder, str) else config.encoder
    names = [str(newest_export(Path("runs"))) if name == "newest" else name for name in names]
    judged = [_judging(name, config) for name in dict.fromkeys(names)]  # what is missing is told before hours pass
    rows = [row for own in sets for each in judged for row in _judge(own, each, config, report)]
    return rows, _facts(config, sets, judged)


def _open(name: str, own: SetConfig, config: EvaluateConfig, report: Report) -> Labelled:
    where = f"datasets.{name}." if config.datasets else ""
    if config.protocol != [FINETUNE]:
        refuse_training_settings(own.data, key=f"{where}data")
    train = open_configured(own.data, key=f"{where}data", progress=report.waiting("preparing data"))
    test = open_configured(own.test, key=f"{where}test", progress=report.waiting("preparing test data"))
    test = label_like(test, train)
    for source in (train, test):
        if source.label_array() is None:
            raise DataError(f"{source.name}: needs a label for every image here (.cls members, or class folders)")
        if source.classes is None:
            refuse_stray(source.name, source.label_array())
    return Labelled(name, own, train, test)


def _judging(name: str, config: EvaluateConfig) -> Judging:
    encoder, facts, section = open_encoder(name, image_size=config.image_size)
    pooling = config.pooling or facts["pooling"]
    encoder.spec.refuse_pooling(pooling)
    return Judging(name, encoder, facts, section, pooling, digest_of(encoder.state()))


def _judge(own: Labelled, each: Judging, config: EvaluateConfig, report: Report) -> list[dict[str, Any]]:
    """The rows of an encoder on a data set; its features are freed with the end of this function."""
    rows, first = [], dist.rank() == 0  # the others only help to extract

    def add(found: Judged, images: int) -> None:
        images = 0 if found.protocol in ("rankme", "alpha_req") else images
        said = {"dataset": own.name, "encoder": each.name, **found._asdict(), "images": images}
        said |= {"interval": wilson(found.value, images) if images else None}
        rows.append(said | {"pooling": each.pooling, "weights": each.weights})

    def tell(what: str) -> None:
        report.say(f"{each.name}: {what}" + (f" on {own.name}" if config.datasets else ""))

    if frozen := [name for name in config.protocol if name != FINETUNE]:
        kept = _train_files(each, own, config, report), _test_files(each, own, config, report)
        parts = [_split(files, source, each, config) for files, source in zip(kept, (own.train, own.test))] if first else []
        for protocol in frozen if first else ():
            tell(protocol)
            for found in judge(protocol, *parts, seeds=config.seeds):
                add(found, len(parts[1].labels))
    if FINETUNE in config.protocol:
        tell(FINETUNE)
        for result in finetuned(own, each, config, report):
            add(*result)
    return rows if first else []


def _train_files(each: Judging, own: Labelled, config: EvaluateConfig, report: Report) -> list[Kept]:
    """Of the training images' centre crops, and of the random ones that linear protocols see."""
    kinds = _kinds(each.encoder, needed(config.protocol), each.pooling)
    views = [_centre(each, config)]
    if config.crops > 1 and (linear := [name for name in config.protocol if name in LINEAR]):
        views += [View(views[0].size, scale=(0.08, 1.0), flip=0.5, copy=number) for number in range(config.crops)]
        crop_kinds = _kinds(each.encoder, needed(linear), each.pooling)
    return [
        _features(each, own.train, view, crop_kinds if number else kinds, own.config, config, report)
        for number, view in enumerate(views)
    ]


def _test_files(each: Judging, own: Labelled, config: EvaluateConfig, report: Report) -> list[Kept]:
    kinds = _kinds(each.encoder, needed(config.protocol), each.pooling)
    return [_features(each, own.test, _centre(each, config), kinds, own.config, config, report)]


def _split(files: Sequence[Kept], source: Source, each: Judging, config: EvaluateConfig) -> Split:
    """The rows that could be used of every view, on the device."""
    rows = functools.reduce(np.intersect1d, [rows for _, rows in files])
    centre, *crops = (_taken(values, rows, source, each, config) for values, _ in files)
    labels = torch.from_numpy(source.label_array()[rows]).to(dist.choose_device(config.device))
    return Split(centre, labels, tuple(crops))


def _centre(each: Judging, config: EvaluateConfig) -> View:
    size = each.encoder.spec.image_size
    return View(size=size, resize=round(min(size) / config.crop_pct))


def _features(
    each: Judging, source: Source, view: View, kinds: Sequence[str], own: SetConfig, config: EvaluateConfig, report: Report
) -> Kept:
    """What the encoder makes of a view of a source's images: (mapped files, rows that could be used)."""
    device = dist.device_here(config.device, "device=")
    how = Extraction(
        view,
        own.data.mean or each.facts["mean"],
        own.data.std or each.facts["std"],
        device=device,
        precision=config.precision,
        batch_size=config.batch_size,
        workers=choose_workers(own.data, device=device),
    )
    options = {"folder": config.features, "tell": report.say, "weights": each.weights}
    return frozen_features(each.encoder, source, own.data, how, kinds, **options)


def _taken(
    found: dict[str, np.ndarray], rows: np.ndarray, source: Source, each: Judging, config: EvaluateConfig
) -> dict[str, torch.Tensor]:
    """These rows of files, on the device."""
    whole = len(rows) == source.num_samples  # then files that are larger than memory stay where they are
    features = {kind: torch.from_numpy(values if whole else values[rows]) for kind, values in found.items()}
    features = {
        kind: values if kind == "patches" else values.to(dist.choose_device(config.device)) for kind, values in features.items()
    }
    return features | {"pooled": features[each.pooling]}


def _kinds(encoder: Encoder, asked: Sequence[str], pooling: str) -> tuple[str, ...]:
    """Those that the encoder has: without a class token there are none of them."""
    kinds = dict.fromkeys((pooling, *asked))
    return tuple(kind for kind in kinds if encoder.spec.class_token or not kind.startswith("class"))


def _facts(config: EvaluateConfig, sets: Sequence[Labelled], judged: Sequence[Judging]) -> Facts:
    """What a page says beside the numbers."""

    def of_set(own: Labelled) -> list[tuple[str, str]]:
        parts = (("train", own.train), ("test", own.test))
        return [(what, f"{part.name}, {part.num_samples:,} images ({part.fingerprint[:12]})") for what, part in parts]

    def of_encoder(each: Judging) -> list[tuple[str, str]]:
        spec = each.encoder.spec
        count = sum(parameter.numel() for parameter in each.encoder.parameters())
        shape = f"width {spec.dim}, {spec.depth} blocks, patches of {spec.patch[0]}x{spec.patch[1]}, {count / 1e6:,.1f} million"
        size = f"{spec.image_size[0]}x{spec.image_size[1]} pixels"
        rows = [("network", f"{each.encoder.architecture}: {shape} parameters"), ("sees", size), ("pooling", each.pooling)]
        step = f", step {each.facts['step']:,}" if "step" in each.facts else ""
        return [*rows, ("from", f"{each.facts.get('run', each.name)}{step}"), ("weights", each.weights)]

    told = ("crop_pct", "crops", "seeds", "precision", "batch_size")
    return {
        "date": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "datasets": {each.name: of_set(each) for each in sets},
        "encoders": {each.name: of_encoder(each) for each in judged},
        "protocols": [(name, (SOURCES | {FINETUNE: SOURCE})[name]) for name in config.protocol],
        "settings": [(name, str(getattr(config, name))) for name in told],
    }
