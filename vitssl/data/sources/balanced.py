"""Classes drawn evenly, however many images each has: the arithmetic of a weighted mixture, with a class as a part.

A class with n images is drawn in proportion to n^(1 - power): power 1 shows every class equally often, 1/2 by the square root
of its images (Mahajan et al. 2018), 0 as they are. In every hundred positions each class stands as often as its share says,
rounded (:mod:`vitssl.data.mixing`); of a thousand classes these are a hundred, spread evenly over their numbers. Surprising:
an epoch is still as many positions as there are images. Each class keeps its own epochs, so in one of the run's a rare class is
seen several times over and a common one only in part.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vitssl import draws
from vitssl.data.mixing import FINEST, MixedOrder
from vitssl.data.order import Order
from vitssl.data.sources.base import Ahead, Raw, Source
from vitssl.errors import DataError
from vitssl.views import purpose

_CLASS = purpose("order of a class")


class Balanced:
    """``source``, every sample under its own id, with an order of its own. Classes without an image are nobody's.

    Raises DataError without labels, and for a class whose share is less than one position in 102,400.
    """

    def __init__(self, source: Source, power: float) -> None:
        self.source, self.power = source, power
        self.name, self.num_samples, self.chunks = source.name, source.num_samples, source.chunks
        self.labels, self.classes, self.ignored = source.labels, source.classes, source.ignored
        self.fingerprint, self.by_chunk, self.mean_bytes = source.fingerprint, source.by_chunk, source.mean_bytes
        labels = source.label_array()
        if labels is None:
            raise DataError(f"{source.name}: balance needs a label for every image (.cls members, or class folders)")
        present, self.counts = np.unique(labels, return_counts=True)
        self.weights = self.counts.astype(np.float64) ** (1 - power)
        rarest = int(np.argmin(self.weights))
        if self.weights[rarest] * FINEST < self.weights.sum():
            label = int(present[rarest])
            name = source.classes[label] if source.classes else label
            raise DataError(
                f"{source.name}: balance={power:g} gives class {name} ({self.counts[rarest]:,} images) less than one in"
                f" {FINEST:,} samples; raise balance, or take the class out"
            )
        self._ids = np.argsort(labels, kind="stable")  # class by class

    def read(self, ids: Sequence[int], ahead: Ahead | None = None) -> list[Raw]:
        """The samples of these ids, in this order."""
        return self.source.read(ids, ahead)

    def label_array(self) -> NDArray[np.int64]:
        """[N] labels."""
        return self.source.label_array()

    def order(self, seed: int) -> "BalancedOrder":
        """The order of a run over it."""
        return BalancedOrder(self._ids, self.counts, self.weights, seed=seed)


class BalancedOrder:
    """A mixture over classes: ``ids`` [N] class by class, of which class c has ``counts[c]`` and the weight ``weights[c]``.

    A class is shuffled as a whole, anew in each of its epochs.
    """

    shuffle = True

    def __init__(self, ids: NDArray[np.int64], counts: NDArray[np.int64], weights: NDArray[np.float64], *, seed: int) -> None:
        orders = [
            Order([count], seed=draws.fold(seed, _CLASS, number), lanes=1, window=count)
            for number, count in enumerate(counts.tolist())
        ]
        self._ids, self._mixed = ids, MixedOrder(orders, weights, seed=seed)
        self.num_samples, self.lanes, self.reach = len(ids), 1, 1

    def locate(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n] int64 positions of the run (>= 0) -> [n] int64 sample ids."""
        return self._ids[self._mixed.locate(positions)]
