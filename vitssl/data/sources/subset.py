"""Sources made of another: a choice of its samples (balanced, for few labels), and its labels under another's numbers."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from vitssl import draws
from vitssl.data.sources.base import Ahead, Raw, Source, fingerprint, one_by_one
from vitssl.errors import DataError, first_of
from vitssl.views import purpose


class Subset:
    """The samples ``ids`` of ``source``, renumbered from 0. Each is a chunk of its own (up to two million chunks)."""

    def __init__(self, source: Source, ids: ArrayLike) -> None:
        self.source, self.ids = source, np.asarray(ids, dtype=np.int64)
        self.num_samples = len(self.ids)
        if not self.num_samples:
            raise DataError(f"{source.name}: no sample was chosen of {source.num_samples:,}; choose at least one")
        self.name = f"{self.num_samples:,} samples of {source.name}"
        self.labels, self.classes, self.ignored = source.labels, source.classes, source.ignored
        self.fingerprint = fingerprint([source.fingerprint, self.ids.tobytes()])
        self.chunks = one_by_one(self.num_samples)
        self.by_chunk, self.mean_bytes = source.by_chunk, source.mean_bytes

    def read(self, ids: Sequence[int], ahead: Ahead | None = None) -> list[Raw]:
        """The samples of these ids of the subset, in this order."""
        ahead = ahead and ahead._replace(ids=self.ids[ahead.ids])
        return self.source.read(self.ids[np.asarray(ids, dtype=np.int64)].tolist(), ahead)

    def label_array(self) -> NDArray[np.int64] | None:
        """[N] labels, or None unless every sample of the source has one."""
        labels = self.source.label_array()
        return None if labels is None else labels[self.ids]


class Renumbered:
    """``source`` with label ``n`` given as ``numbers[n]``; ``classes`` are the names under the new numbers."""

    def __init__(self, source: Source, numbers: Sequence[int], classes: tuple[str, ...]) -> None:
        self.source, self.numbers, self.classes = source, np.asarray(numbers, dtype=np.int64), classes
        self.name, self.num_samples, self.chunks = source.name, source.num_samples, source.chunks
        self.labels, self.ignored, self.fingerprint = source.labels, source.ignored, source.fingerprint
        self.by_chunk, self.mean_bytes = source.by_chunk, source.mean_bytes

    def read(self, ids: Sequence[int], ahead: Ahead | None = None) -> list[Raw]:
        """The samples of these ids, in this order."""
        raws = self.source.read(ids, ahead)
        return [raw if raw.label is None else raw._replace(label=int(self.numbers[raw.label])) for raw in raws]

    def label_array(self) -> NDArray[np.int64]:
        """[N] labels."""
        return self.numbers[self.source.label_array()]


def label_like(source: Source, model: Source) -> Source:
    """``source`` with its labels under the numbers that ``model`` has for the same names; as it is where names are unknown.

    Raises DataError for missing labels, and for a class that ``model`` does not have.
    """
    labels, known = source.label_array(), model.label_array()
    for each, found in ((source, labels), (model, known)):
        if found is None:
            raise DataError(f"{each.name}: needs a label for every image here (.cls members, or class folders)")
    if source.classes and model.classes:
        unknown = [source.classes[label] for label in np.unique(labels) if source.classes[label] not in model.classes]
        if unknown:
            raise DataError(
                f"{source.name}: {len(unknown)} classes are not among those of {model.name}: {first_of(unknown)}; correct one"
            )
        if source.classes == model.classes:
            return source
        numbers = [model.classes.index(name) if name in model.classes else -1 for name in source.classes]
        return Renumbered(source, numbers, model.classes)
    if labels.max() > known.max():
        raise DataError(f"{source.name}: has label {labels.max()}, {model.name} has 0 to {known.max()}; correct one")
    return source


def take_labelled(source: Source, *, num: int, seed: int) -> Subset:
    """``num`` labelled samples, as many of each class as there are to be had, a function of (seed, source) alone.

    Choices are nested: of one seed, the smaller is part of the larger. Raises DataError where labels or samples are missing.
    """
    labels = source.label_array()
    if labels is None:
        missing = getattr(source, "num_unlabelled", source.num_samples)
        raise DataError(f"{source.name}: {missing:,} of {source.num_samples:,} samples have no label; name a labelled set")
    if not 1 <= num <= len(labels):
        raise DataError(
            f"{source.name}: cannot choose {num:,} of {len(labels):,} labelled samples; ask for 1 to {len(labels):,}"
        )
    key = draws.hashed(seed, purpose("few labels"), torch.arange(len(labels)), 1)[:, 0].numpy()
    order = np.lexsort((key, labels))  # class by class, at random inside each
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    rank = np.arange(len(labels)) - np.repeat(starts, counts)  # the how-manieth of its class
    chosen = order[np.lexsort((key[order], rank))][:num]
    return Subset(source, np.sort(chosen))
