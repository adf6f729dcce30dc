"""Which source, and which of its samples, stands at which position where several are mixed by weight: arithmetic again.

Positions come in blocks of 100. In block b source k gets as many of them as there are points (j + o_b) / 100, j = 0..99,
between the cumulated weights of the sources before it and its own: ``100 x weight`` rounded down or up, and exactly that where
it is whole. The offsets o_b run through a van der Corput sequence of 1024 blocks, so the rounding spreads itself evenly and
counts up to any block are a table and a multiplication. Inside a block the places are permuted, so that no process sees one
source only. Each source keeps its own order and its own epochs.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from vitssl import draws
from vitssl.data.order import Order
from vitssl.errors import ConfigError
from vitssl.views import purpose

BLOCK = 100
_PERIOD = 1024  # blocks after which the counts repeat
FINEST = BLOCK * _PERIOD
"""A source with a smaller share than one in so many samples has no position."""
_PLACES = purpose("places of a mixture")


class MixedOrder:
    """The order of a run over the joined ids of several sources; ``orders`` are theirs, ``weights`` positive numbers.

    ``num_samples`` is that of all sources together. Raises ConfigError for a weight too small to get a position.
    """

    shuffle = True

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], *, seed: int) -> None:
        assert len(orders) == len(weights) and len(orders), "a weight for each source"
        self.orders, self.seed = list(orders), seed
        sizes = np.array([order.num_samples for order in orders], dtype=np.int64)
        self.num_samples = int(sizes.sum())
        self.lanes, self.reach = 1, min(order.reach for order in orders)
        self._firsts = np.cumsum(sizes) - sizes  # where the ids of each source begin
        shares = np.asarray(weights, dtype=np.float64)
        self._borders = np.cumsum(shares / shares.sum())
        blocks = np.repeat(np.arange(_PERIOD), BLOCK)
        drawn = self._sources(blocks, np.tile(np.arange(BLOCK), _PERIOD)).reshape(_PERIOD, BLOCK)
        cells = np.arange(_PERIOD)[:, None] * len(orders) + drawn
        counts = np.bincount(cells.ravel(), minlength=_PERIOD * len(orders)).reshape(_PERIOD, -1)  # [period, sources]
        self._before = np.zeros((_PERIOD + 1, len(orders)), dtype=np.int32)  # of a thousand sources it is small enough
        np.cumsum(counts, axis=0, out=self._before[1:])
        if not self._before[-1].all():
            least = int(np.argmin(self._before[-1]))
            raise ConfigError(
                f"data.sources.{least}: a weight of {weights[least]:g} among {sum(weights):g} is less than one of"
                f" {FINEST:,} samples; raise it or take the source out"
            )

    def locate(self, positions: ArrayLike) -> NDArray[np.int64]:
        """[n] int64 positions of the run (>= 0) -> [n] int64 ids, those of the first source first."""
        blocks, places = np.divmod(np.asarray(positions, dtype=np.int64), BLOCK)
        wanted, row = np.unique(blocks, return_inverse=True)
        numbers = (wanted[:, None] * BLOCK + np.arange(BLOCK)).ravel()
        keys = draws.hashed(self.seed, _PLACES, torch.from_numpy(numbers), 1).numpy().reshape(-1, BLOCK)
        slots = np.argsort(keys, axis=1, kind="stable")  # [blocks, places]: which point of the block stands at a place
        sources = self._sources(np.repeat(wanted, BLOCK), slots.ravel()).reshape(-1, BLOCK)
        full, rest = np.divmod(wanted, _PERIOD)
        ids, asked = np.empty_like(blocks), sources[row, places]
        for source in np.unique(asked).tolist():
            before = full * int(self._before[-1, source]) + self._before[rest, source]  # its samples in all earlier blocks
            earlier = np.cumsum(sources == source, axis=1) - 1  # and before each place of its own in this one
            chosen = asked == source
            own = before[row[chosen]] + earlier[row[chosen], places[chosen]]
            ids[chosen] = self._firsts[source] + self.orders[source].locate(own)
        return ids

    def counts(self, stop: int) -> NDArray[np.int64]:
        """[sources] how many of the positions below ``stop`` (a multiple of 100) each source fills."""
        full, rest = divmod(stop // BLOCK, _PERIOD)
        before = self._before.astype(np.int64)
        return full * before[-1] + before[rest]

    def _sources(self, blocks: NDArray, slots: NDArray) -> NDArray:
        """[n] blocks and [n] points in them -> [n] sources."""
        points = (slots + _offsets()[blocks % _PERIOD]) / BLOCK
        return np.minimum(np.searchsorted(self._borders, points, side="right"), len(self.orders) - 1)


def _offsets() -> NDArray[np.float64]:
    """[1024] numbers in (0, 1): the van der Corput sequence in base 2, in the middle of its cells."""
    numbers = np.arange(_PERIOD)
    bits = _PERIOD.bit_length() - 1
    reversed_bits = sum(((numbers >> bit) & 1) << (bits - 1 - bit) for bit in range(bits))
    return (reversed_bits + 0.5) / _PERIOD
