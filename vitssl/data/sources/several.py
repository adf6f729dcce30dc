"""Several labels a sample, or none: the same samples under the same ids, with sets where other sources have one number.

File lists say them in one cell (``cat;dog``), tar shards in a ``.cls`` of several numbers or in ``"labels": [...]`` of a
``.json``, data sets in a column of lists. They are read when somebody asks for them; a source of single labels knows nothing of
this.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitssl.data.sources.base import Ahead, Raw, Source, fingerprint, refuse_stray
from vitssl.errors import DataError, first_of


class LabelSets(NamedTuple):
    """The labels of sample i are ``labels[starts[i] : starts[i + 1]]``; ``classes`` are their names, where they have any."""

    starts: NDArray[np.int64]  # [N + 1]
    labels: NDArray[np.int64]
    classes: tuple[str, ...] | None


def label_sets(counts: NDArray[np.int64], labels: NDArray[np.int64], classes: tuple[str, ...] | None) -> LabelSets:
    """From how many labels each sample has [N], and all of them in a row."""
    return LabelSets(np.concatenate([[0], np.cumsum(counts)]), labels, classes)


class Several:
    """``source`` with ``sets`` for labels: a sample's ``label`` is a tuple. ``num_classes`` counts also those nobody has."""

    def __init__(self, source: Source, sets: LabelSets, classes: tuple[str, ...]) -> None:
        self.source, self.sets, self.classes, self.num_classes = source, sets, classes, len(classes)
        self.name, self.num_samples, self.chunks = source.name, source.num_samples, source.chunks
        self.labels, self.ignored = True, source.ignored
        self.fingerprint = fingerprint([source.fingerprint, sets.starts.tobytes(), sets.labels.tobytes()])
        self.by_chunk, self.mean_bytes = source.by_chunk, source.mean_bytes

    def read(self, ids: Sequence[int], ahead: Ahead | None = None) -> list[Raw]:
        """The samples of these ids, in this order."""
        starts, labels = self.sets.starts, self.sets.labels
        raws = self.source.read(ids, ahead)
        own = [tuple(labels[starts[number] : starts[number + 1]].tolist()) for number in ids]
        return [raw._replace(label=each) for raw, each in zip(raws, own, strict=True)]

    def label_array(self) -> None:
        """There is no one label for every sample."""

    def counts(self) -> NDArray[np.int64]:
        """[classes] samples that have each label."""
        return np.bincount(self.sets.labels, minlength=self.num_classes)


def several_labels(source: Source) -> Several:
    """The labels of ``source``, several a sample. Raises DataError for kinds of source that cannot say them, and for data in
    which no sample has any."""
    if not hasattr(source, "label_sets"):
        kinds = "file lists, local tar shards and data sets of kind=hub"
        raise DataError(f"{source.name}: labels=several reads {kinds}; write one of these")
    sets = source.label_sets()
    if not len(sets.labels):
        raise DataError(f"{source.name}: no sample has a label; write them, as cat;dog in a list's column label")
    if sets.classes is None:
        refuse_stray(source.name, sets.labels)
    classes = sets.classes or tuple(map(str, range(int(sets.labels.max()) + 1)))
    return Several(source, _without_repeats(sets), classes)


def several_like(source: Several, model: Several) -> Several:
    """``source`` with its labels under the numbers that ``model`` has for the same names.

    Raises DataError for a class that some sample has and ``model`` does not know.
    """
    if source.classes == model.classes:
        return source
    place = {name: number for number, name in enumerate(model.classes)}
    unknown = [source.classes[label] for label in np.flatnonzero(source.counts()) if source.classes[label] not in place]
    if unknown:
        raise DataError(
            f"{source.name}: {len(unknown)} classes are not among those of {model.name}: {first_of(unknown)}; correct one"
        )
    return renumbered(source, [place.get(name, -1) for name in source.classes], model.classes)


def renumbered(source: Several, numbers: Sequence[int], classes: tuple[str, ...]) -> Several:
    """``source`` with label ``n`` given as ``numbers[n]``, left out where that is -1."""
    new = np.asarray(numbers, dtype=np.int64)[source.sets.labels]
    owner = np.repeat(np.arange(source.num_samples), np.diff(source.sets.starts))
    counts = np.bincount(owner[new >= 0], minlength=source.num_samples)
    return Several(source.source, _without_repeats(label_sets(counts, new[new >= 0], classes)), classes)


def _without_repeats(sets: LabelSets) -> LabelSets:
    """Each sample's labels once, sorted: two names that were merged are one."""
    owner = np.repeat(np.arange(len(sets.starts) - 1), np.diff(sets.starts))
    base = int(sets.labels.max(initial=0)) + 1
    owner, labels = np.divmod(np.unique(owner * base + sets.labels), base)
    return label_sets(np.bincount(owner, minlength=len(sets.starts) - 1), labels, sets.classes)
