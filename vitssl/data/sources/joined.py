"""Several sources as one: their ids one after the other. How often each is drawn is :mod:`vitssl.data.mixing`'s business."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vitssl.data.sources.base import Ahead, Raw, Source
from vitssl.data.sources.subset import label_like


class Joined:
    """``parts`` with ``weights``. Where all have labels, they must be of the first one's classes (DataError otherwise)."""

    def __init__(self, parts: Sequence[Source], weights: Sequence[float]) -> None:
        self.labels = all(part.labels for part in parts)
        self.parts = [label_like(part, parts[0]) for part in parts] if self.labels else list(parts)
        self.weights = list(weights)
        self.name = " + ".join(f"{weight:g} x {part.name}" for part, weight in zip(parts, weights, strict=True))
        self.num_samples = sum(part.num_samples for part in parts)
        self.ignored = sum(part.ignored for part in parts)
        self.chunks = np.concatenate([part.chunks for part in parts])
        self.classes = parts[0].classes if self.labels else None
        self.fingerprint = "+".join(part.fingerprint for part in parts)
        self.by_chunk, self.mean_bytes = any(part.by_chunk for part in parts), max(part.mean_bytes for part in parts)
        self._starts = np.cumsum([0] + [part.num_samples for part in parts[:-1]])

    def read(self, ids: Sequence[int], ahead: Ahead | None = None) -> list[Raw]:
        """The samples of these ids, in this order; a key says of which part it is."""
        ids = np.asarray(ids, dtype=np.int64)
        owners = self._owners(ids)
        soon = self._owners(ahead.ids) if ahead else None
        found: dict[int, Raw] = {}
        for owner in np.unique(owners).tolist():
            rows, start = np.flatnonzero(owners == owner), self._starts[owner]
            part = ahead and Ahead(ahead.ids[soon == owner] - start, ahead.memory // len(self.parts))
            raws = self.parts[owner].read((ids[rows] - start).tolist(), part)
            found |= {row: raw._replace(key=f"{owner}:{raw.key}") for row, raw in zip(rows.tolist(), raws, strict=True)}
        return [found[row] for row in range(len(ids))]

    def _owners(self, ids: NDArray) -> NDArray:
        return np.searchsorted(self._starts, ids, side="right") - 1

    def label_array(self) -> NDArray[np.int64] | None:
        """[N] labels, or None unless every part has all of them."""
        return np.concatenate([part.label_array() for part in self.parts]) if self.labels else None
