"""The one contract of every source: samples numbered from 0, cut into chunks, and ``read(ids)``, which gives the bytes.

In what order they are read is not a source's business (:mod:`vitssl.data.order`). Sources are small pickles and open files
lazily, so a worker process is handed one as it is.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class Raw(NamedTuple):
    """One sample as it is stored: the encoded image, its label where it has one, and ``where`` it lies, for messages."""

    key: str
    image: bytes
    label: int | None
    where: str


class Source(Protocol):
    """Images somewhere. ``chunks`` [C] int64 counts the samples of each chunk: chunk c holds ``counts[c]`` consecutive ids."""

    name: str
    num_samples: int
    chunks: NDArray[np.int64]
    labels: bool  # whether every sample has a label
    classes: tuple[str, ...] | None

    def read(self, ids: Sequence[int]) -> list[Raw]:
        """The samples of these ids, in this order. Raises DataError where one cannot be read."""
        ...

    def label_array(self) -> NDArray[np.int64] | None:
        """[N] labels of all samples without reading an image, or None unless every sample has one."""
        ...
