"""Frozen encoders, their features on two labelled sets, and what each protocol makes of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.encoders import open_encoder
from finetune.evaluate import EvaluateConfig
from vitssl import dist
from vitssl.data.feed import open_configured
from vitssl.data.layout import choose_workers
from vitssl.data.sources import Source, label_like
from vitssl.errors import DataError
from vitssl.models.encoder import Encoder
from vitssl.probes.protocols import Split, judge, needed, wilson
from vitssl.report import Report
from vitssl.train.export import newest_export
from vitssl.train.frozen import Extraction, frozen_features
from vitssl.views import View


def evaluate(config: EvaluateConfig, report: Report) -> list[dict[str, Any]]:
    """A row for every encoder, protocol, setting and seed, on the first process; others help to extract features.

    Raises ConfigError, DataError and CheckpointError.
    """
    dist.begin()
    train = open_configured(config.data, key="data", progress=report.waiting("preparing data"))
    test = label_like(open_configured(config.test, key="test", progress=report.waiting("preparing test data")), train)
    for source in (train, test):
        if source.label_array() is None:
            raise DataError(f"{source.name}: needs a label for every image here (.cls members, or class folders)")
    encoders = [config.encoder] if isinstance(config.encoder, str) else config.encoder
    encoders = [str(newest_export(Path("runs"))) if name == "newest" else name for name in encoders]
    # what is missing is told before hours pass
    loaded = [open_encoder(name, image_size=config.image_size)[:2] for name in encoders]
    rows = []
    for name, (encoder, facts) in zip(encoders, loaded, strict=True):
        pooling = config.pooling or facts["pooling"]
        encoder.spec.refuse_pooling(pooling)
        parts = [_split(encoder, facts, source, pooling, config, report) for source in (train, test)]
        for protocol in config.protocol if dist.rank() == 0 else ():
            report.say(f"{name}: {protocol}")
            for found in judge(protocol, *parts, seeds=config.seeds):
                scale = found.protocol not in ("rankme", "alpha_req")
                interval = wilson(found.value, len(parts[1].labels)) if scale else None
                rows.append({"encoder": name, **found._asdict(), "interval": interval, "pooling": pooling})
    return rows


def _split(
    encoder: Encoder, facts: dict[str, Any], source: Source, pooling: str, config: EvaluateConfig, report: Report
) -> Split:
    """The features of a set that the protocols ask for, on the device."""
    size, device = encoder.spec.image_size, config.device
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    how = Extraction(
        View(size=size, resize=round(min(size) / config.crop_pct)),
        config.data.mean or facts["mean"],
        config.data.std or facts["std"],
        device=device,
        precision=config.precision,
        batch_size=config.batch_size,
        workers=choose_workers(config.data, device=device),
    )
    kinds = _kinds(encoder, needed(config.protocol), pooling)
    found, rows = frozen_features(encoder, source, config.data, how, kinds, folder=config.features, tell=report.say)
    whole = len(rows) == source.num_samples  # then files that are larger than memory stay where they are
    features = {kind: torch.from_numpy(values if whole else values[rows]) for kind, values in found.items()}
    features = {kind: values if kind == "patches" else values.to(device) for kind, values in features.items()}
    labels = torch.from_numpy(source.label_array()[rows]).to(device)
    return Split(features | {"pooled": features[pooling]}, labels)


def _kinds(encoder: Encoder, asked: Sequence[str], pooling: str) -> tuple[str, ...]:
    """Those that the encoder has: without a class token there are none of them."""
    kinds = dict.fromkeys((pooling, *asked))
    return tuple(kind for kind in kinds if encoder.spec.class_token or not kind.startswith("class"))
