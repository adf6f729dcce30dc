"""What ``python -m finetune.embed`` does: an encoder, its features of a source, a folder of files; or how fast that goes."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from finetune.embed import EmbedConfig
from finetune.encoders import open_encoder
from vitssl import dist
from vitssl.data.augment import Normalize
from vitssl.data.feed import evaluation_samples, open_configured, refuse_training_settings
from vitssl.data.layout import choose_workers
from vitssl.data.loader import evaluation_batches
from vitssl.data.sources import Subset
from vitssl.data.transforms import check_channels
from vitssl.errors import ConfigError
from vitssl.models.encoder import Encoder
from vitssl.models.state import digest_of
from vitssl.report import Report, duration
from vitssl.train.embedding import Embedding, Output
from vitssl.train.frozen import Extraction
from vitssl.train.layers import Feature
from vitssl.views import View

ROUNDS = 3  # of a measurement, in which the sides take turns
BATCHES = 3  # of each side in a round


def write(config: EmbedConfig, report: Report) -> int:
    """Write the features; returns the exit code. Raises ConfigError, DataError and CheckpointError."""
    dist.begin()
    embedding, facts = prepare(config, report)
    start, last = time.monotonic(), [0.0]

    def progress(done: int, total: int) -> None:
        if report.console.is_terminal or done == total or time.monotonic() - last[0] > 30:
            last[0] = time.monotonic()
            rate = done / (last[0] - start)
            of_all = f" of this process ({dist.world()} are at work)" if dist.world() > 1 else ""
            left = f", {duration((total - done) / rate)} to go" if done < total else ""
            report.progress(done, total, f"{done:,}/{total:,} images{of_all}  {rate:,.1f} images/s{left}")

    about = embedding.write(tell=report.say, progress=progress, facts=facts)
    report.rest()
    shapes = {feature.name: list(feature.shape(embedding.encoder.spec)) for feature in embedding.features}
    report.pairs(
        f"features of {about['rows']:,} of {about['images']:,} images in {config.out}",
        [(name, f"{shape} {config.dtype}") for name, shape in shapes.items()],
    )
    return 0


def prepare(config: EmbedConfig, report: Report) -> tuple[Embedding, dict[str, object]]:
    """What is to be written, and what ``about.json`` says beside that."""
    encoder, facts, _ = open_encoder(config.encoder, image_size=config.image_size)
    kinds = config.kind or [facts["pooling"]]
    features = [Feature(kind, _layer(layer, encoder), config.norm) for kind in kinds for layer in config.layer]
    if "class" in kinds:
        encoder.spec.require_class_token("kind=class")
    refuse_training_settings(config.data, key="data")
    check_channels(encoder.spec.channels, arrays=config.data.arrays)
    source = open_configured(config.data, key="data", progress=report.waiting("preparing data"))
    size = encoder.spec.image_size
    device = dist.device_here(config.device, "device=")
    how = Extraction(
        View(size=size, resize=round(min(size) / config.crop_pct)),
        config.data.mean or facts["mean"],
        config.data.std or facts["std"],
        device=device,
        precision=config.precision,
        batch_size=config.batch_size,
        workers=choose_workers(config.data, device=device),
    )
    output = Output(config.out or Path(), config.format, half=config.dtype == "fp16", rows=config.rows)
    shapes = {feature.name: list(feature.shape(encoder.spec)) for feature in features}
    said = {"encoder": config.encoder, "data": source.name, "shapes": shapes}
    return Embedding(encoder, digest_of(encoder.state()), source, config.data, how, features, output), said


def _layer(layer: int | str, encoder: Encoder) -> int | None:
    depth = encoder.spec.depth
    if layer == "last":
        return None
    if not 1 <= layer <= depth:
        raise ConfigError(f"layer={layer}: the encoder has {depth} blocks; take 1 to {depth}, or last")
    return layer


def measure(config: EmbedConfig, report: Report) -> int:
    """Images per second of extraction with all that belongs to it, of the encoder's forward alone on batches that are there,
    and of reading and decoding alone: over the same images, in turns, in one process."""
    with tempfile.TemporaryDirectory() as folder:
        embedding, _ = prepare(config.model_copy(update={"out": Path(folder) / "features"}), report)
        num = min(embedding.source.num_samples, BATCHES * config.batch_size)
        embedding = replace(embedding, source=Subset(embedding.source, np.arange(num)))
        how, spec = embedding.how, embedding.encoder.spec
        encoder = embedding.encoder.to(how.device).eval()
        blocks = max(feature.blocks(spec) for feature in embedding.features)
        samples = evaluation_samples(embedding.source, config.data, [how.view], channels=spec.channels)
        normalize = Normalize(how.mean, how.std, channels=spec.channels).to(how.device)

        def load() -> list[torch.Tensor]:
            options = {"batch_size": how.batch_size, "workers": how.workers}
            return [batch.views[how.view] for batch in evaluation_batches(samples, **options)]

        ready = [normalize(pixels.to(how.device)) for pixels in load()]

        @torch.inference_mode()
        def forward() -> None:
            for images in ready:
                with torch.autocast(how.device, torch.bfloat16) if how.precision == "bf16" else nullcontext():
                    encoder(images, last_blocks=blocks)
            if how.device == "cuda":
                torch.cuda.synchronize()

        def extract() -> None:
            number = len(list(Path(folder).iterdir()))
            output = replace(embedding.output, folder=Path(folder) / f"{number}", rows=num)
            replace(embedding, output=output).write(tell=report.say, progress=lambda done, total: None, facts={})

        forward()  # what is slow once is not measured
        sides = {"extraction": extract, "bare forward": forward, "loading": load}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for _ in range(ROUNDS):
            for name, act in sides.items():
                found[name].append(_seconds(act))
    rates = {name: [num / clock for clock, _ in each] for name, each in found.items()}
    pairs = list(zip(found["extraction"], found["bare forward"], strict=True))
    ratio, busy = (statistics.median(bare[which] / whole[which] for whole, bare in pairs) for which in (0, 1))
    middle = {name: statistics.median(each) for name, each in rates.items()}
    said = {
        **middle,
        "ratio": ratio,
        "ratio of processor time": busy,
        "loading share": middle["extraction"] / middle["loading"],
    }
    rows = [(name, f"{middle[name]:,.2f} images/s ({min(each):,.2f} to {max(each):,.2f})") for name, each in rates.items()]
    rows += [("ratio", f"{ratio:.3f} of the bare forward, {busy:.3f} by processor time (medians of {ROUNDS} pairs)")]
    rows += [("loading", f"{said['loading share']:.1%} of extraction's time, if nothing overlapped")]
    report.pairs(f"{num:,} images in batches of {how.batch_size}, {how.precision}, {how.workers} loader processes", rows)
    report.say(json.dumps({name: round(value, 4) for name, value in said.items()}))
    return 0


def _seconds(act: Callable[[], object]) -> tuple[float, float]:
    """By the clock, and of all processors, loader processes included: what a machine that others use too makes of it."""
    start, busy = time.perf_counter(), _busy()
    act()
    return time.perf_counter() - start, _busy() - busy


def _busy() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
