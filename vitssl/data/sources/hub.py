"""A Hugging Face data set: one on the hub, a local folder of any form its library reads, or one it saved to a disk.

The library fetches and converts once, into its own cache; then rows are read from memory-mapped Arrow files, and images as they
are stored: nothing is decoded there. Surprising: the library's own fingerprint differs between machines, so ours is taken from
the columns, all labels, and the bytes of 64 images spread over the rows.
"""

import os
from collections.abc import Sequence

import datasets
import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from vitssl.data.order import default_chunk
from vitssl.data.sources.base import Ahead, Raw, cut, fingerprint, read_file, too_large
from vitssl.data.sources.columns import check_labels, find_columns, find_label_lists, label_values, reason, stored
from vitssl.data.sources.patterns import is_saved
from vitssl.data.sources.several import LabelSets, label_sets
from vitssl.errors import ConfigError, DataError

_COMPARED = 64  # images that go into the fingerprint


class HubSource:
    """``path`` is a folder that ``save_to_disk`` wrote, or what ``load_dataset`` takes: ``user/name``, ``user/name@config``.

    ``split`` defaults to train. The image is the one column that holds images, the label the one of class labels, or whole
    numbers named label, labels or cls; null and negative mean none. Raises ConfigError for a split of what has none, DataError
    for what cannot be loaded, holds no or several columns of images, or no row.
    """

    def __init__(self, path: str, *, split: str | None = None) -> None:
        self.name, self._trusted = path, os.path.exists(path)
        found, self._split = _saved(path, split) if is_saved(path) else _loaded(path, split or "train")
        self._columns = find_columns(found.features.arrow_schema, where=path)
        named = [name for name in self._columns[:2] if name is not None]
        self._rows = found.select_columns(named).with_format("arrow")
        self._lists = find_label_lists(found.features.arrow_schema)
        self._sets = found.select_columns(self._lists[0]).with_format("arrow") if self._lists else None
        self.num_samples = len(found)
        if not self.num_samples:
            raise DataError(f"{path}: has no rows; name another data set or split")
        labels = self._label_values()
        self.num_unlabelled = int((labels < 0).sum())
        self.labels = self.num_unlabelled == 0
        self.classes = self._columns.classes if self.labels else None
        check_labels(int(labels.max()), self._columns.classes, where=path)
        self.chunks = cut(np.array([self.num_samples]), default_chunk(self.num_samples))
        self.ignored = 0
        self.by_chunk, self.mean_bytes = False, 0
        some = np.unique(np.linspace(0, self.num_samples - 1, _COMPARED).astype(np.int64))
        parts = [*map(repr, self._columns), labels.tobytes(), *(raw.image for raw in self.read(some))]
        self.fingerprint = fingerprint(parts)

    def read(self, ids: Sequence[int], ahead: Ahead | None = None) -> list[Raw]:
        """The samples of these ids, in this order, each with its bytes or its problem."""
        ids = np.asarray(ids, dtype=np.int64).tolist()
        if not ids:
            return []
        table = self._rows[ids]
        images = table.column(self._columns.image).to_pylist()
        labels = [-1] * len(ids) if self._columns.label is None else label_values(table.column(self._columns.label)).tolist()
        return [self._raw(*each) for each in zip(ids, images, labels, strict=True)]

    def label_array(self) -> NDArray[np.int64] | None:
        """[N] labels, or None unless every row has one (``num_unlabelled`` counts those that have none)."""
        return self._label_values() if self.labels else None

    def label_sets(self) -> LabelSets:
        """The labels of all rows, several each, of a column of lists; null is none. Raises DataError where there is no such."""
        if self._sets is None:
            raise DataError(f"{self.name}: has no column of lists of class labels; write one that is called labels")
        column = self._sets[:].column(0)
        counts = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
        labels = label_values(pc.list_flatten(column))
        if labels.min(initial=0) < 0:
            raise DataError(f"{self.name}: column {self._lists[0]} holds a label that is null or negative; number from 0 on")
        check_labels(int(labels.max(initial=-1)), self._lists[1], where=self.name)
        return label_sets(counts, labels, self._lists[1])

    def _label_values(self) -> NDArray[np.int64]:
        """[N] labels, -1 where there is none; read each time, since the file is mapped into memory."""
        name = self._columns.label
        return np.full(self.num_samples, -1) if name is None else label_values(self._rows.select_columns(name)[:].column(name))

    def _raw(self, number: int, image: dict | bytes | None, label: int) -> Raw:
        key, label = f"{self._split}/{number}", label if label >= 0 else None
        content, path = stored(image)
        if content or not path:
            where = f"{self.name}: row {key}"
            problem = too_large(where, len(content))
            return Raw(key, b"" if problem else content, label, where, problem)
        problem = ""
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device, which might never end
            problem = "is no file"
        elif not (self._trusted or _is_cached(path)):
            problem = "is a file of this machine"
        if problem:
            return Raw(key, b"", label, path, f"{path}: {problem}, but {self.name} names it as an image; take it out")
        return read_file(path, key=key, label=label)


def _is_cached(path: str) -> bool:
    """Whether the library itself fetched a file."""
    caches = (os.path.realpath(each) for each in (datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE))
    return any(os.path.realpath(path).startswith(cache + os.sep) for cache in caches)


def _saved(path: str, split: str | None) -> tuple[datasets.Dataset, str]:
    """The split of a folder written by ``save_to_disk``, and its name."""
    try:
        found = datasets.load_from_disk(path)
    except Exception as error:  # damaged files make it raise whatever they like
        raise DataError(f"{path}: cannot be loaded ({reason(error)}); save it to disk again") from None
    if isinstance(found, datasets.Dataset):
        if split not in (None, str(found.split)):
            raise ConfigError(f"{path}: is one split, {found.split or 'unnamed'}, so there is no {split!r}; name no split")
        return found, str(found.split or "all")
    if (split := split or "train") not in found:
        raise DataError(f"{path}: has no split {split!r}, only {', '.join(found)}; set the split to one that is there")
    return found[split], split


def _loaded(path: str, split: str) -> tuple[datasets.Dataset, str]:
    """The split of a data set that the library finds, fetches and converts, and its name. Nothing in it is executed."""
    name, _, config = (path, "", "") if os.path.exists(path) else path.partition("@")
    try:
        return datasets.load_dataset(name, config or None, split=split), split
    except Exception as error:  # of the network, the hub, their caches and every format
        raise DataError(f"{path}: split {split!r} cannot be loaded ({reason(error)}); correct the name or the split") from None
