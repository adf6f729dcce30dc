"""Parquet files whose rows are samples. A row group is a chunk: read whole for any of its samples, and kept for a while.

Opening reads the files' footers alone: rows per group, and from the statistics of the label column whether every row has a
label. Surprising: an image that is named by a path instead of held is refused, because the file may have come from anywhere and
the path would be on this machine.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vitssl.data.buffer import ChunkBuffer
from vitssl.data.index import identity_of
from vitssl.data.sources.base import DEFAULT_MEMORY, Ahead, Raw, fingerprint, too_large
from vitssl.data.sources.columns import Columns, check_labels, find_columns, label_values, reason, stored
from vitssl.data.sources.patterns import PARQUET, find_shards, shortened
from vitssl.data.stores import USUAL, Unreachable
from vitssl.errors import DataError


class _Group(NamedTuple):
    file: int
    number: int  # in its file
    first: int  # row of its file
    rows: int
    size: int  # bytes of its images
    unlabelled: int
    largest: int  # label, -1 where there is none


class ParquetSource:
    """Files named by a brace pattern, a glob, a folder of them, one, or a list of these; all with the same columns.

    The image is the one column of bytes, or of a struct of bytes and path (of several the one named image, img, jpg, png or
    webp); the label that of class labels, or whole numbers named label, labels or cls, where null and negative mean none.
    ``progress(files done, files in all)`` is called while footers are read. Raises ConfigError for urls and patterns that do
    not expand, DataError for files that are missing, damaged, without a row or with other columns than the first.
    """

    by_chunk = True

    def __init__(self, path: str | Sequence[str], *, progress: Callable[[int, int], None] | None = None) -> None:
        self.name = shortened(path)
        files = find_shards(path, form=PARQUET)
        groups: list[_Group] = []
        for number, file in enumerate(files):
            columns, found = _look(file, number)
            self._columns = columns if number == 0 else self._columns
            if columns != self._columns:
                raise DataError(
                    f"{file}: its columns ({_told(columns)}) are not those of {files[0]} ({_told(self._columns)}); "
                    "name them apart, in data.sources"
                )
            groups += found
            if progress is not None:
                progress(number + 1, len(files))
        if not groups:
            raise DataError(f"{self.name}: has no rows; correct the path")
        self.chunks = np.array([group.rows for group in groups], dtype=np.int64)
        self._places = np.array([group[:3] for group in groups], dtype=np.int64)  # [C, 3] file, its row group, first row of it
        self._starts = np.cumsum(self.chunks) - self.chunks
        self._files, self._names = (np.array([os.fsencode(each) for each in found]) for found in (files, _names(files)))
        self.num_samples = int(self.chunks.sum())
        self.num_unlabelled = sum(group.unlabelled for group in groups)
        self.labels = self.num_unlabelled == 0
        self.classes = self._columns.classes if self.labels else None
        check_labels(max(group.largest for group in groups), self._columns.classes, where=self.name)
        self.ignored = 0
        self.mean_bytes = sum(group.size for group in groups) // self.num_samples
        self.fingerprint = fingerprint([repr(self._columns), *(identity_of(file, USUAL) for file in files)])
        self._buffer = ChunkBuffer(self._fetch, size=_bytes, threads=4)
        self._labels: NDArray[np.int64] | None = None

    def read(self, ids: Sequence[int], ahead: Ahead | None = None) -> list[Raw]:
        """The samples of these ids, in this order, each with its bytes or its problem."""
        ids = np.asarray(ids, dtype=np.int64)
        memory = ahead.memory if ahead else DEFAULT_MEMORY
        groups = self._group_of(ids)
        soon = [*np.unique(groups).tolist(), *(self._group_of(ahead.ids).tolist() if ahead else ())]
        self._buffer.expect(dict.fromkeys(soon), limit=memory)
        found: dict[int, Raw] = {}
        for row in np.argsort(groups, kind="stable").tolist():  # group by group: none is fetched twice where few fit
            found[row] = self._raw(int(ids[row]), int(groups[row]), memory)
        return [found[row] for row in range(len(ids))]

    def label_array(self) -> NDArray[np.int64] | None:
        """[N] labels, or None unless every row has one (``num_unlabelled`` counts those that have none)."""
        if self.labels and self._labels is None:
            name, found = self._columns.label, []
            for file in map(os.fsdecode, self._files):
                with _opened(file) as parquet:
                    found.append(label_values(parquet.read(columns=[name], use_threads=False).column(name)))
            self._labels = np.concatenate(found)
            if len(self._labels) != self.num_samples or self._labels.min() < 0:
                raise DataError(f"{self.name}: rows or labels are not what the footers say; write the files again")
        return self._labels

    def _raw(self, number: int, group: int, memory: int) -> Raw:
        file, _, first = self._places[group].tolist()
        place = number - int(self._starts[group])
        key = f"{os.fsdecode(self._names[file])}/{first + place}"
        where = f"{os.fsdecode(self._files[file])}: row {first + place:,}"
        try:
            images, labels = self._buffer.get(group, limit=memory)
        except DataError as error:
            return Raw(key, b"", None, where, str(error), passing=isinstance(error, Unreachable))
        content, path = stored(images[place].as_py())
        label = None if labels is None or labels[place] < 0 else int(labels[place])
        problem = too_large(where, len(content))
        if path and not content:
            problem = f"{where}: names {path} and does not hold it; write images into the file"
        return Raw(key, b"" if problem else content, label, where, problem)

    def _group_of(self, ids: NDArray) -> NDArray:
        return np.searchsorted(self._starts, ids, side="right") - 1

    def _fetch(self, group: int) -> tuple[pa.ChunkedArray, NDArray[np.int64] | None]:
        """(images, labels) of a row group."""
        (file, number, _), rows = self._places[group].tolist(), int(self.chunks[group])
        image, label, _ = self._columns
        with _opened(os.fsdecode(self._files[file])) as parquet:
            columns = [image] if label is None else [image, label]
            table = parquet.read_row_group(number, columns=columns, use_threads=False)
            if table.num_rows != rows:
                raise ValueError(f"row group {number} has {table.num_rows:,} rows and had {rows:,}")
            return table.column(image), None if label is None else label_values(table.column(label))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_labels": None}


@contextmanager
def _opened(file: str) -> Iterator[pq.ParquetFile]:
    """A file and its footer. Raises Unreachable where the disk is at fault, DataError where the file is."""
    try:
        with pa.OSFile(file) as opened:
            yield pq.ParquetFile(opened)
    except OSError as error:
        kind = Unreachable if error.errno else DataError
        raise kind(f"{file}: cannot be read ({reason(error)}); put it back, or take it out of the path") from None
    except (pa.ArrowException, ValueError, LookupError) as error:
        raise DataError(f"{file}: is damaged, changed, or no parquet file ({reason(error)}); fetch it again") from None


def _look(file: str, number: int) -> tuple[Columns, list[_Group]]:
    """The columns of a file and its row groups, from its footer."""
    groups, first = [], 0
    with _opened(file) as parquet:
        columns, facts = find_columns(parquet.schema_arrow, where=file), parquet.metadata
        leaves = {facts.schema.column(place).path: place for place in range(facts.num_columns)}
        image = leaves.get(f"{columns.image}.bytes", leaves.get(columns.image))
        for place in range(facts.num_row_groups):
            group = facts.row_group(place)
            if not group.num_rows:
                continue
            unlabelled, largest = group.num_rows, -1
            if columns.label is not None:
                unlabelled, largest = _labels_of(parquet, place, columns.label, leaves[columns.label])
            size = group.column(image).total_uncompressed_size
            groups.append(_Group(number, place, first, group.num_rows, size, unlabelled, largest))
            first += group.num_rows
    return columns, groups


def _labels_of(parquet: pq.ParquetFile, group: int, name: str, leaf: int) -> tuple[int, int]:
    """(rows without a label, largest label) of a row group; its label column is read only where statistics do not say it."""
    known = parquet.metadata.row_group(group).column(leaf).statistics
    if known is not None and known.has_null_count and known.has_min_max and known.min >= 0:
        return known.null_count, known.max
    labels = label_values(parquet.read_row_group(group, columns=[name], use_threads=False).column(name))
    return int((labels < 0).sum()), int(labels.max())


def _names(files: Sequence[str]) -> list[str]:
    """The files below the folder that all of them lie in."""
    paths = [os.path.abspath(file) for file in files]
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, folder) for path in paths]


def _told(columns: Columns) -> str:
    classes = "" if columns.classes is None else f" of {len(columns.classes)} classes"
    return f"image {columns.image}, " + (f"label {columns.label}{classes}" if columns.label else "no label")


def _bytes(chunk: tuple[pa.ChunkedArray, NDArray[np.int64] | None]) -> int:
    return chunk[0].nbytes
