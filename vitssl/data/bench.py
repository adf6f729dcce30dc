"""``--bench data``: images a second and core of this data engine beside the usual ones, on the config's images, in one run.

The references make the same views of the same images: PIL, torchvision's RandomResizedCrop, flip, ToTensor, Normalize and
collation, once on the encoded bytes as they lie and once through a plain webdataset pipeline. All run on one thread of this
process in turns, so a machine that drifts slows all of them; the figures are medians.
"""

import copy
import io
import itertools
import json
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import default_collate

from vitssl.data import transforms
from vitssl.data.augment import Normalize, seen
from vitssl.data.feed import BATCH, training_samples
from vitssl.data.layout import choose_layouts, choose_workers
from vitssl.data.loader import batches
from vitssl.data.samples import Samples
from vitssl.data.sources import ShardSource, Source
from vitssl.report import Report
from vitssl.sections import DataConfig
from vitssl.views import View

ROUNDS = 3


def bench_data(
    source: Source,
    config: DataConfig,
    views: Iterable[View],
    *,
    channels: int,
    device: str,
    report: Report,
    seconds: float = 4.0,
    step_rate: float | None = None,
) -> dict[str, Any]:
    """Measure, print and return images/s per core of each pipeline, the parts of ours, and its rate with loader processes.

    ``step_rate`` is how many images/s training takes where data cost nothing: with it, advice is given.
    """
    views = tuple(views)
    layouts = choose_layouts(source, config)
    samples = training_samples(source, config, views, seed=0, layouts=layouts, channels=channels)
    makers: dict[str, Callable[[], Iterator[int]]] = {"ours": lambda: _ours(samples, config, device)}
    if not config.arrays:  # the references know pictures only
        makers["torchvision"] = lambda: _torchvision(samples, config, views)
    if _webdataset_reads(source, samples):
        makers["webdataset"] = lambda: _webdataset(source, config, views)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rates: dict[str, list[float]] = {name: [] for name in makers}
        for _ in range(ROUNDS):
            for name, make in makers.items():
                rates[name].append(_rate(make(), seconds))
        parts = _parts(samples, device, seconds)
        starts = _starts(samples, source, config, views)
    finally:
        torch.set_num_threads(threads)
    row: dict[str, Any] = {f"{name}_per_core": round(statistics.median(found), 1) for name, found in rates.items()}
    row |= {f"times_{name}": round(row["ours_per_core"] / row[f"{name}_per_core"], 2) for name in makers if name != "ours"}
    row |= parts | starts
    workers = choose_workers(config, device=device)
    feed = batches(samples, start=0, stop=None, batch_size=BATCH, micro_batch=BATCH, workers=workers)
    next(feed)  # its workers have started
    began, busy = time.perf_counter(), time.thread_time()
    row |= {"workers": workers, "with_workers": round(_rate((len(batch) for batch in feed), seconds), 1)}
    row["main_busy"] = round((time.thread_time() - busy) / (time.perf_counter() - began), 4) if workers else 1.0
    row |= {"step_rate": round(step_rate, 1)} if step_rate else {}
    _tell(row, source, views, report)
    return row


def _tell(row: dict[str, Any], source: Source, views: tuple[View, ...], report: Report) -> None:
    sizes = ", ".join(f"{view.size[0]} x {view.size[1]}" for view in views)
    others = [name for name in ("torchvision", "webdataset") if f"{name}_per_core" in row]
    beside = [f"{row[f'times_{name}']:.2f} times {name}'s {row[f'{name}_per_core']:,.0f}" for name in others]
    cores = f"{row['workers']} loader processes on {os.cpu_count()} cores"
    report.pairs(
        f"{source.num_samples:,} images of {source.name}, {len(views)} views ({sizes})",
        [
            ("a core", ", ".join([f"{row['ours_per_core']:,.0f} images/s", *beside])),
            (
                "of it",
                f"reading {row['read']:.0%}, decoding {row['decode']:.0%}, crop, resize and flip {row['views']:.0%},"
                f" transfer {row['transfer']:.0%}",
            ),
            ("together", f"{row['with_workers']:,.0f} images/s, {cores}, this process {row['main_busy']:.1%} busy"),
            ("first batch", _in_words(row)),
            *([("advice", advice(row))] if "step_rate" in row else []),
        ],
    )
    report.say(json.dumps(row))


def advice(row: dict[str, Any]) -> str:
    """What a measured row says about feeding the step, and what would help."""
    feed, step = row["with_workers"], row["step_rate"]
    if feed >= step:
        return f"feeds the step ({step:,.0f} images/s) {feed / step:.1f} times over: nothing to do"
    cores = math.ceil((step - feed) / row["ours_per_core"])
    smaller = "256-px shards (vitssl pack --short-side 256), or " if row["short_side"] > 320 else ""
    return (
        f"feeds {feed / step:.0%} of the step ({step:,.0f} images/s): {cores} more cores"
        f" (data.workers={row['workers'] + cores}), or {smaller}data.repeats={math.ceil(step / feed)}"
    )


def _in_words(row: dict[str, Any]) -> str:
    said = f"{row['start_s']:.3f} s from the beginning, {row['resume_s']:.3f} s from {row['resume_at']:,} samples on"
    return said + (f" ({row['skip_s']:.1f} s by skipping them, as webdataset does)" if "skip_s" in row else "")


def _starts(samples: Samples, source: Source, config: DataConfig, views: tuple[View, ...]) -> dict[str, float]:
    """Seconds to the first batch of a process that knows nothing yet: at the beginning, and far into the epoch."""
    unused = copy.deepcopy(samples)
    at = min(1_000_000, source.num_samples - BATCH) // BATCH * BATCH

    def first(position: int) -> float:
        fresh, began = copy.deepcopy(unused), time.perf_counter()
        next(batches(fresh, start=position, stop=None, batch_size=BATCH, micro_batch=BATCH))
        return time.perf_counter() - began

    if at <= 0:
        at = BATCH  # into a later epoch: few images
    first(0)  # the disk's cache is warm for all
    found = [(first(0), first(at)) for _ in range(2 * ROUNDS)]
    row = {"resume_at": at, "start_s": _median(each[0] for each in found), "resume_s": _median(each[1] for each in found)}
    if _webdataset_reads(source, samples) and at < source.num_samples:
        began = time.perf_counter()
        next(_webdataset(source, config, views, skip=at))
        row["skip_s"] = round(time.perf_counter() - began, 4)
    return row


def _webdataset_reads(source: Source, samples: Samples) -> bool:
    """Shards of colour pictures; urls are opened under our rules alone."""
    pictures = samples.channels == 3 and not samples.decoding["arrays"]
    return isinstance(source, ShardSource) and pictures and not source.by_chunk


def _median(seconds: Iterable[float]) -> float:
    return round(statistics.median(seconds), 4)


def _rate(counts: Iterator[int], seconds: float) -> float:
    """Images per second over at least ``seconds``, after a first batch that warms up."""
    next(counts)
    began, done = time.perf_counter(), 0
    for count in counts:
        done += count
        if (elapsed := time.perf_counter() - began) >= seconds:
            return done / elapsed
    raise AssertionError("a pipeline that is measured never ends")


def _positions() -> Iterator[range]:
    first = 0
    while True:
        yield range(first, first + BATCH)
        first += BATCH


def _ours(samples: Samples, config: DataConfig, device: str) -> Iterator[int]:
    """With what is left to the device where colours are changed there: the reference changes them on the way."""
    half = (0.5,) * samples.channels
    normalize = Normalize(config.mean or half, config.std or half, channels=samples.channels).to(device)
    coloured = any(view.photometric.changes for view in samples.views)
    for positions in _positions():
        batch = samples.__getitems__(positions)
        if coloured:
            batch = batch.to(device)
            for view in samples.views:
                seen(batch, view, normalize, seed=samples.seed)
            if device == "cuda":
                torch.cuda.synchronize()
        yield len(batch)


def _reference(config: DataConfig, view: View) -> Callable[[Image.Image], Tensor]:
    from torchvision import transforms as tv

    area = (
        [tv.Resize(view.resize or min(view.size), tv.InterpolationMode.BICUBIC), tv.CenterCrop(view.size)]
        if view.scale is None
        else [tv.RandomResizedCrop(view.size, view.scale, view.ratio, tv.InterpolationMode.BICUBIC)]
    )
    mean, std = config.mean or (0.5, 0.5, 0.5), config.std or (0.5, 0.5, 0.5)
    return tv.Compose([*area, tv.RandomHorizontalFlip(view.flip), *_colours(view), tv.ToTensor(), tv.Normalize(mean, std)])


def _colours(view: View) -> list[Callable[[Image.Image], Image.Image]]:
    """What the references do to colours, with PIL."""
    from torchvision import transforms as tv

    change = view.photometric
    if not change.changes:
        return []

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*change.sigma)))

    return [
        tv.RandomApply([tv.ColorJitter(change.brightness, change.contrast, change.saturation, change.hue)], change.jitter),
        tv.RandomGrayscale(change.grey),
        tv.RandomApply([blur], change.blur),
        tv.RandomApply([ImageOps.solarize], change.solarize),
    ]


def _torchvision(samples: Samples, config: DataConfig, views: tuple[View, ...]) -> Iterator[int]:
    made = [_reference(config, view) for view in views]
    for positions in _positions():
        raws = samples.source.read(samples.order.locate(positions))
        images = (_opened(raw.image) for raw in raws)
        yield len(default_collate([[make(image) for make in made] for image in images])[0])


def _webdataset(source: ShardSource, config: DataConfig, views: tuple[View, ...], *, skip: int = 0) -> Iterator[int]:
    import webdataset

    made = [_reference(config, view) for view in views]
    extensions = ";".join(("jpg", "jpeg", "png", "webp"))
    pipeline = webdataset.WebDataset(source.manifest.shards, shardshuffle=False).repeat()
    pipeline = pipeline.compose(lambda samples: itertools.islice(samples, skip, None)) if skip else pipeline.shuffle(1000)
    # Never .decode(): webdataset's decoder unpickles members of some names, whatever else it was asked for.
    pipeline = pipeline.to_tuple(extensions).map(lambda sample: [make(_opened(sample[0])) for make in made])
    for batch in pipeline.batched(BATCH, collation_fn=default_collate):
        yield len(batch[0])


def _opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content), formats=transforms.FORMATS).convert("RGB")


def _parts(samples: Samples, device: str, seconds: float) -> dict[str, float]:
    """Shares of the time that reading, decoding, making views and moving them to the device take; the median short side."""
    spent, sides = {"read": 0.0, "decode": 0.0, "views": 0.0, "transfer": 0.0}, []
    for positions in _positions():
        marks = [time.perf_counter()]
        raws = samples.source.read(samples.order.locate(positions))
        marks.append(time.perf_counter())
        images = [transforms.decode(raw, samples.channels, **samples.decoding) for raw in raws]
        marks.append(time.perf_counter())
        views = []
        for view in samples.views:
            numbers = transforms.draw_numbers(view, seed=samples.seed, positions=positions).tolist()
            shown = [transforms.show(image, view, row) for image, row in zip(images, numbers, strict=True)]
            views.append(transforms.stacked(shown, view, samples.channels))
        marks.append(time.perf_counter())
        for view in views:
            view.to(device)
        if device == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
        sides += [min(image.shape[:2]) for image in images]
        for name, start, end in zip(spent, marks, marks[1:]):
            spent[name] += end - start
        if (total := sum(spent.values())) > seconds:
            shares = {name: round(part / total, 3) for name, part in spent.items()}
            return shares | {"short_side": statistics.median(sides)}
    raise AssertionError("positions never end")
