"""Frozen encoders, their features on labelled sets, and what each protocol makes of them."""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.encoders import open_encoder
from finetune.evaluate import FINETUNE, EvaluateConfig, SetConfig
from finetune.tuned import SOURCE, Judging, Labelled, finetuned, settings_of
from vitssl import dist
from vitssl.data.feed import open_configured
from vitssl.data.layout import choose_workers
from vitssl.data.sources import Source, label_like
from vitssl.errors import DataError
from vitssl.models.encoder import Encoder
from vitssl.probes.protocols import SOURCES, Judged, Split, judge, needed, wilson
from vitssl.report import Report
from vitssl.train.export import newest_export
from vitssl.train.frozen import Extraction, frozen_features, weights_hash
from vitssl.views import View

Facts = dict[str, Any]


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
    train = open_configured(own.data, key=f"{where}data", progress=report.waiting("preparing data"))
    test = open_configured(own.test, key=f"{where}test", progress=report.waiting("preparing test data"))
    test = label_like(test, train)
    for source in (train, test):
        if source.label_array() is None:
            raise DataError(f"{source.name}: needs a label for every image here (.cls members, or class folders)")
    return Labelled(name, own, train, test)


def _judging(name: str, config: EvaluateConfig) -> Judging:
    encoder, facts, section = open_encoder(name, image_size=config.image_size)
    pooling = config.pooling or facts["pooling"]
    encoder.spec.refuse_pooling(pooling)
    return Judging(name, encoder, facts, section, pooling, weights_hash(encoder))


def _judge(own: Labelled, each: Judging, config: EvaluateConfig, report: Report) -> list[dict[str, Any]]:
    """The rows of an encoder on a data set; its features are freed with the end of this function."""
    rows = []

    def add(found: Judged, images: int) -> None:
        images = 0 if found.protocol in ("rankme", "alpha_req") else images
        said = {"dataset": own.name, "encoder": each.name, **found._asdict(), "images": images}
        said |= {"interval": wilson(found.value, images) if images else None}
        rows.append(said | {"pooling": each.pooling, "weights": each.weights})

    def tell(what: str) -> None:
        report.say(f"{each.name}: {what}" + (f" on {own.name}" if config.datasets else ""))

    if frozen := [name for name in config.protocol if name != FINETUNE]:
        parts = [_split(each, source, own.config, config, report) for source in (own.train, own.test)]
        for protocol in frozen if dist.rank() == 0 else ():
            tell(protocol)
            for found in judge(protocol, *parts, seeds=config.seeds):
                add(found, len(parts[1].labels))
    if FINETUNE in config.protocol:
        tell(FINETUNE)
        for result in finetuned(own, each, config, report):
            add(*result)
    return rows if dist.rank() == 0 else []


def _split(each: Judging, source: Source, own: SetConfig, config: EvaluateConfig, report: Report) -> Split:
    """The features of a set that the protocols ask for, on the device."""
    encoder, device = each.encoder, config.device
    size = encoder.spec.image_size
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    how = Extraction(
        View(size=size, resize=round(min(size) / config.crop_pct)),
        own.data.mean or each.facts["mean"],
        own.data.std or each.facts["std"],
        device=device,
        precision=config.precision,
        batch_size=config.batch_size,
        workers=choose_workers(own.data, device=device),
    )
    kinds = _kinds(encoder, needed(config.protocol), each.pooling)
    options = {"folder": config.features, "tell": report.say, "weights": each.weights}
    found, rows = frozen_features(encoder, source, own.data, how, kinds, **options)
    whole = len(rows) == source.num_samples  # then files that are larger than memory stay where they are
    features = {kind: torch.from_numpy(values if whole else values[rows]) for kind, values in found.items()}
    features = {kind: values if kind == "patches" else values.to(device) for kind, values in features.items()}
    labels = torch.from_numpy(source.label_array()[rows]).to(device)
    return Split(features | {"pooled": features[each.pooling]}, labels)


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

    own = {"crop_pct": config.crop_pct, "seeds": config.seeds, "precision": config.precision, "batch_size": config.batch_size}
    return {
        "date": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "datasets": {each.name: of_set(each) for each in sets},
        "encoders": {each.name: of_encoder(each) for each in judged},
        "protocols": [(name, (SOURCES | {FINETUNE: SOURCE})[name]) for name in config.protocol],
        "settings": [(name, str(value)) for name, value in own.items()],
    }
