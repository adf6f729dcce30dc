"""Which sample stands at which position of the run: arithmetic over (seed, chunk sizes), so resuming is knowing one integer.

Position p is row i = p % N of epoch e = p // N. In an epoch the chunk ids are permuted and laid end to end; the line of N
samples is cut into ``lanes`` segments that differ by at most one sample; inside a lane samples are permuted in windows of
``window``; row i is sample i // lanes of lane i % lanes. Nothing here depends on processes, workers, batch size or on what
was asked before. Chunks are what is read together, lanes what makes neighbours in a batch come from far apart.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from vitssl import draws
from vitssl.views import purpose

WINDOW = 1024
_FORWARD = 256  # positions to look ahead where nothing is shuffled
_CHUNKS, _SAMPLES = purpose("order of chunks"), purpose("order of samples")
# Highly divisible: whole lanes for almost any number of processes and workers.
_LANES = (1, 2, 4, 6, 12, 24, 60, 120, 240, 360, 720, 840, 1260, 1680, 2520, 5040, 7560, 10080)
_USUAL = 240  # lanes that are enough for any mixing, and for 60 processes that read


class Layout(NamedTuple):
    """What the order over a source depends on besides its samples and the seed.

    ``chunk``, samples of a chunk, where that is a choice and not the data's. A run records it: what is chosen may depend on
    what is known of the data today, and on the machine.
    """

    lanes: int
    window: int
    chunk: int | None = None


def default_lanes(num_samples: int, loaders: int = 1, *, most: float = math.inf) -> int:
    """The largest highly divisible number of at most ``num_samples`` / 1000 and 240, so that any machine trains the same run.

    More than 240 only where more than 60 ``loaders`` read side by side: then the smallest that gives each of them four. Never
    more than ``most``, which are those that memory has room for.
    """
    enough = min((lanes for lanes in _LANES if lanes >= max(_USUAL, 4 * loaders)), default=_LANES[-1])
    return max(lanes for lanes in _LANES if lanes == 1 or lanes <= min(enough, most, num_samples / 1000))


def default_chunk(num_samples: int, mean_bytes: int | None = None) -> int:
    """Samples per chunk: 16, and as many more as keep an epoch at no more than two million chunks.

    ``mean_bytes`` of a sample are given where a chunk is one request to a server: then it holds about a MiB.
    """
    least = 16 if mean_bytes is None else max(1, (1 << 20) // max(1, mean_bytes))
    return max(least, -(-num_samples // 2_000_000))


class Order:
    """The order of a run over chunks of samples; ids count the samples chunk by chunk.

    ``reach`` is how many positions ahead a reader should look; ``chunks`` [C] are sample counts (>= 1). ``lanes`` defaults to
    :func:`default_lanes`. ``shuffle=False`` is the identity, epoch after epoch. Picklable and small: two epochs of chunk order
    and four windows are kept.
    """

    def __init__(
        self, chunks: ArrayLike, *, seed: int, lanes: int | None = None, window: int = WINDOW, shuffle: bool = True
    ) -> None:
        self.chunks = np.asarray(chunks, dtype=np.int64)
        if self.chunks.ndim != 1 or not len(self.chunks) or self.chunks.min() < 1:
            raise ValueError("an order needs at least one chunk, and each chunk at least one sample")
        self.num_samples = int(self.chunks.sum())
        self.seed, self.window, self.shuffle = seed, window, shuffle
        self.lanes = default_lanes(self.num_samples) if lanes is None else lanes
        if not 1 <= self.lanes <= self.num_samples or window < 1:
            raise ValueError(f"{self.lanes} lanes with windows of {window} do not fit {self.num_samples} samples")
        self.reach = self.lanes * -(-window // 2) if shuffle else _FORWARD
        self._starts = np.cumsum(self.chunks) - self.chunks
        self._epochs: OrderedDict[int, tuple[NDArray, NDArray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], tuple[NDArray, NDArray]] = OrderedDict()

    def locate(self, positions: ArrayLike) -> NDArray[np.int64]:
        """[n] int64 positions of the run (>= 0) -> [n] int64 sample ids."""
        epochs, rows = np.divmod(np.asarray(positions, dtype=np.int64), self.num_samples)
        if not self.shuffle:
            return rows
        ids = np.empty_like(rows)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            ids[chosen] = self._in_epoch(epoch, rows[chosen])
        return ids

    def _in_epoch(self, epoch: int, rows: NDArray) -> NDArray:
        places, lanes = np.divmod(rows, self.lanes)
        windows, places = np.divmod(places, self.window)
        line = np.empty_like(rows)
        for window in np.unique(windows).tolist():  # all lanes advance together, so a batch touches one window or two
            chosen = windows == window
            line[chosen] = self._in_window(epoch, window, lanes[chosen], places[chosen])
        order, prefix = self._epoch(epoch)
        slot = np.searchsorted(prefix, line, side="right") - 1
        return self._starts[order[slot]] + line - prefix[slot]

    def _in_window(self, epoch: int, window: int, lanes: NDArray, places: NDArray) -> NDArray:
        """[n] places in one window of the given lanes -> [n] places on the line of the epoch."""
        share, rest = divmod(self.num_samples, self.lanes)
        starts = lanes * share + np.minimum(lanes, rest) + window * self.window
        orders, filled = _cached(self._windows, (epoch, window), self._no_windows, limit=4)
        needed = np.unique(lanes[~filled[lanes]])
        if len(needed):
            first = needed * share + np.minimum(needed, rest) + window * self.window
            width = orders.shape[1]
            keys = draws.hashed(
                self.seed, draws.fold(_SAMPLES, epoch), torch.from_numpy((first[:, None] + np.arange(width)).ravel()), 1
            )
            keys = keys.numpy().reshape(len(needed), width)
            size = share + (needed < rest) - window * self.window  # of the window, where it is the lane's last
            keys[np.arange(width) >= size[:, None]] = np.iinfo(np.int64).max  # behind the lane's end: sorted to the back
            orders[needed] = np.argsort(keys, axis=1, kind="stable")
            filled[needed] = True
        return starts + orders[lanes, places]

    def _no_windows(self) -> tuple[NDArray, NDArray]:
        width = min(self.window, -(-self.num_samples // self.lanes))
        return np.empty((self.lanes, width), dtype=np.int32), np.zeros(self.lanes, dtype=bool)

    def _epoch(self, epoch: int) -> tuple[NDArray, NDArray]:
        """The chunk ids of an epoch in their order, and where each begins on the line, both [C]."""

        def permuted() -> tuple[NDArray, NDArray]:
            order = draws.permutation(self.seed, draws.fold(_CHUNKS, epoch), len(self.chunks)).numpy().astype(np.int32)
            counts = self.chunks[order]
            return order, np.cumsum(counts) - counts

        return _cached(self._epochs, epoch, permuted, limit=2)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_epochs": OrderedDict(), "_windows": OrderedDict()}


def _cached(
    cache: OrderedDict, key: object, make: Callable[[], tuple[NDArray, NDArray]], *, limit: int
) -> tuple[NDArray, NDArray]:
    if key not in cache:
        cache[key] = make()
        while len(cache) > limit:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]
