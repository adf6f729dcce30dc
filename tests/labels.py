"""A source of labels alone, for what chooses and orders samples by them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vitssl.data.sources.base import one_by_one


@dataclass
class Labels:
    """Samples that have a label each, or, with ``labels=False``, none; nothing of them can be read."""

    numbers: Sequence[int]
    classes: tuple[str, ...] | None = None
    name: str = "photos"
    labels: bool = True
    ignored: int = 0
    fingerprint: str = "x"
    by_chunk: bool = False
    mean_bytes: int = 1
    chunks: object = field(init=False)

    def __post_init__(self) -> None:
        self.num_samples, self.chunks = len(self.numbers), one_by_one(len(self.numbers))

    def label_array(self) -> np.ndarray | None:
        return np.asarray(self.numbers, dtype=np.int64) if self.labels else None
