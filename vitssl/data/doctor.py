"""Looks at every image of a source once: what there is, what is damaged, what is twice, and the numbers a recipe needs."""

import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vitssl.data import transforms
from vitssl.data.arrays import is_array, open_array
from vitssl.data.pool import side_by_side
from vitssl.data.sources import Raw, Source
from vitssl.errors import DataError
from vitssl.views import View

CHUNK = 64  # samples looked at between two reports of progress
THUMB = View((64, 64))


@dataclass
class Findings:
    """What was seen. ``sizes`` [n, 3] are width, height and bytes; ``mean`` and ``std`` [C] are in units of [0, 1]."""

    samples: int = 0
    formats: Counter = field(default_factory=Counter)
    modes: Counter = field(default_factory=Counter)
    labels: Counter = field(default_factory=Counter)
    sizes: list[tuple[int, int, int]] = field(default_factory=list)
    damaged: list[tuple[str, str]] = field(default_factory=list)  # key, reason
    contents: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # hash -> keys
    pixels: int = 0
    sums: NDArray = field(default_factory=lambda: np.zeros((2, 1)))  # of values and of their squares; [2, C] with an image
    thumbs: list[tuple[int, NDArray]] = field(default_factory=list)  # id and [64, 64, C]

    @property
    def mean(self) -> list[float]:
        return (self.sums[0] / max(1, self.pixels)).tolist()

    @property
    def std(self) -> list[float]:
        return np.sqrt(np.maximum(0, self.sums[1] / max(1, self.pixels) - np.square(self.mean))).tolist()

    @property
    def duplicates(self) -> list[list[str]]:
        """Groups of keys whose images are the same bytes."""
        return [keys for keys in self.contents.values() if len(keys) > 1]

    def add(self, other: "Findings") -> None:
        """Take in what was seen elsewhere."""
        self.samples += other.samples
        self.pixels += other.pixels
        self.sums = self.sums + other.sums
        for counts, more in ((self.formats, other.formats), (self.modes, other.modes), (self.labels, other.labels)):
            counts.update(more)
        for found, more in ((self.sizes, other.sizes), (self.damaged, other.damaged), (self.thumbs, other.thumbs)):
            found.extend(more)
        for content, keys in other.contents.items():
            self.contents[content] += keys


def examine(
    source: Source,
    *,
    channels: int | None = None,
    thumbs: int = 48,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Findings:
    """Read and decode every image; ``thumbs`` of them, spread evenly, are kept small. Raises DataError for unreadable files.

    ``channels`` (None: pictures, as three) decodes arrays as well.
    """
    shown = set(np.linspace(0, source.num_samples - 1, min(thumbs, source.num_samples)).astype(int).tolist())
    tasks = [range(first, min(first + CHUNK, source.num_samples)) for first in range(0, source.num_samples, CHUNK)]
    found = Findings()
    for part in side_by_side(partial(_look, source, shown, channels), tasks, processes):
        found.add(part)
        if progress is not None:
            progress(found.samples, source.num_samples)
    return found


def _look(source: Source, shown: set[int], channels: int | None, ids: range) -> Findings:
    torch.set_num_threads(1)
    found = Findings(samples=len(ids))
    for number, raw in zip(ids, source.read(ids), strict=True):
        if not raw.problem:
            found.contents[hashlib.blake2b(raw.image, digest_size=16).hexdigest()].append(raw.key)
        found.labels.update([] if raw.label is None else [raw.label])
        try:
            pixels = transforms.decode(raw, 3 if channels is None else channels, arrays=channels is not None)
        except DataError as error:
            found.damaged.append((raw.key, str(error)))
            continue
        _note(found, raw, pixels, arrays=channels is not None)
        if number in shown:
            found.thumbs.append((number, np.array(transforms.show(pixels, THUMB, [0.5] * transforms.NUM_DRAWS))))
    return found


def _note(found: Findings, raw: Raw, pixels: transforms.Pixels, *, arrays: bool) -> None:
    if arrays and is_array(raw.image):
        header = open_array(raw)
        found.formats.update([header.format])
        found.modes.update([str(header.dtype)])
    else:
        with Image.open(io.BytesIO(raw.image)) as header:
            found.formats.update([header.format])
            found.modes.update([header.mode])
    height, width, channels = pixels.shape
    found.sizes.append((width, height, len(raw.image)))
    # Counting is exact, and fast.
    counts = np.stack([np.bincount(pixels[:, :, channel].ravel(), minlength=256) for channel in range(channels)])
    values = np.arange(256) / 255
    found.pixels += height * width
    found.sums = found.sums + np.stack([counts @ values, counts @ values**2])
