"""Parquet files whose rows are samples. A row group is a chunk: read whole for any of its samples, and kept for a while.

Files may lie on this machine or elsewhere, where parts of them are asked for as they are needed. Opening reads the footers
alone: rows per group, and from the statistics of the label column whether every row has a label. Surprising: an image that is
named by a path instead of held is refused, because the file may have come from anywhere and the path would be on this machine.
"""

import io
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vitssl.data import remote
from vitssl.data.buffer import ChunkBuffer
from vitssl.data.index import identity_of
from vitssl.data.sources.base import DEFAULT_MEMORY, Ahead, Raw, fingerprint, too_large
from vitssl.data.sources.columns import Columns, check_labels, find_columns, label_values, reason, stored
from vitssl.data.sources.patterns import PARQUET, find_shards, shortened
from vitssl.data.stores import USUAL, Access, Passing, Unreachable, is_url, parted, shown
from vitssl.errors import DataError

_THREADS = 16  # that read footers, most of the time waiting for a server
_SLACK = 256 << 20  # bytes by which a row group may exceed eight times what its footer says: of one that lies, no more is read


class _File(NamedTuple):
    """A path or url, and what tells its content (:func:`identity_of`)."""

    path: str
    identity: str


class _Group(NamedTuple):
    number: int  # in its file
    first: int  # row of its file
    rows: int
    size: int  # bytes of its images
    unlabelled: int
    largest: int  # label, -1 where there is none


class _Remote(io.RawIOBase):
    """A file elsewhere, of which only what is asked for is fetched."""

    def __init__(self, file: _File, access: Access) -> None:
        self.file, self.access, self.place, self.size = file, access, 0, int(file.identity.partition("-")[0])

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.size}[whence]
        return self.place

    def readinto(self, into: memoryview) -> int:
        length = max(0, min(len(into), self.size - self.place))
        path, identity = self.file
        into[:length] = remote.read(path, self.place, length, self.size, self.access, identity=identity) if length else b""
        self.place += length
        return length


class ParquetSource:
    """Files named by a brace pattern, a glob, a folder of them, one, or a list of these; all with the same columns.

    The image is the one column of bytes, or of a struct of bytes and path (of several the one named image, img, jpg, png or
    webp); the label that of class labels, or whole numbers named label, labels or cls, where null and negative mean none.
    ``progress(files done, files in all)`` is called while footers are read. Raises ConfigError for patterns that do not expand
    and urls that are not allowed, DataError for files that are missing, damaged, without a row or with other columns than the
    first.
    """

    by_chunk = True

    def __init__(
        self,
        path: str | Sequence[str],
        *,
        access: Access = USUAL,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.name, self.access = shortened(path), access
        files = find_shards(path, access, form=PARQUET)
        groups, places, identities = [], [], []
        with ThreadPoolExecutor(_THREADS) as pool:
            for number, (identity, columns, found) in enumerate(pool.map(partial(_look, access=access), files)):
                self._columns = columns if number == 0 else self._columns
                if columns != self._columns:
                    raise DataError(
                        f"{shown(files[number])}: its columns ({_told(columns)}) are not those of {shown(files[0])} "
                        f"({_told(self._columns)}); name them apart, in data.sources"
                    )
                identities.append(identity)
                groups += found
                places += [(number, group.number, group.first) for group in found]
                if progress is not None:
                    progress(number + 1, len(files))
        if not groups:
            raise DataError(f"{self.name}: has no rows; correct the path")
        self.chunks = np.array([group.rows for group in groups], dtype=np.int64)
        self._places = np.array(places, dtype=np.int64)  # [C, 3] file, its row group, first row of it
        self._sizes = np.array([group.size for group in groups], dtype=np.int64)  # bytes, as the footers say
        self._starts = np.cumsum(self.chunks) - self.chunks
        self._files, self._names, self._identities = (
            np.array([os.fsencode(each) for each in found]) for found in (files, _names(files), identities)
        )
        self.num_samples = int(self.chunks.sum())
        self.num_unlabelled = sum(group.unlabelled for group in groups)
        self.labels = self.num_unlabelled == 0
        self.classes = self._columns.classes if self.labels else None
        check_labels(max(group.largest for group in groups), self._columns.classes, where=self.name)
        self.ignored = 0
        self.mean_bytes = sum(group.size for group in groups) // self.num_samples
        self.fingerprint = fingerprint([repr(self._columns), *identities])
        self._buffer = ChunkBuffer(self._fetch, size=_bytes, expected=self._expected, threads=4)
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
            for number in range(len(self._files)):
                with _opened(self._file(number), self.access) as parquet:
                    found.append(label_values(parquet.read(columns=[name], use_threads=False).column(name)))
            self._labels = np.concatenate(found)
            if len(self._labels) != self.num_samples or self._labels.min() < 0:
                raise DataError(f"{self.name}: rows or labels are not what the footers say; write the files again")
        return self._labels

    def _raw(self, number: int, group: int, memory: int) -> Raw:
        file, _, first = self._places[group].tolist()
        place = number - int(self._starts[group])
        key = f"{os.fsdecode(self._names[file])}/{first + place}"
        where = f"{shown(os.fsdecode(self._files[file]))}: row {first + place:,}"
        try:
            images, labels = self._buffer.get(group, limit=memory)
        except DataError as error:
            return Raw(key, b"", None, where, str(error), passing=isinstance(error, Passing))
        content, path = stored(images[place].as_py())
        label = None if labels is None or labels[place] < 0 else int(labels[place])
        problem = too_large(where, len(content))
        if path and not content:
            problem = f"{where}: names {path} and does not hold it; write images into the file"
        return Raw(key, b"" if problem else content, label, where, problem)

    def _group_of(self, ids: NDArray) -> NDArray:
        return np.searchsorted(self._starts, ids, side="right") - 1

    def _file(self, number: int) -> _File:
        return _File(os.fsdecode(self._files[number]), self._identities[number].decode())

    def _expected(self, group: int) -> int:
        return int(self._sizes[group])

    def _fetch(self, group: int) -> tuple[pa.ChunkedArray, NDArray[np.int64] | None]:
        """(images, labels) of a row group."""
        (file, number, _), rows = self._places[group].tolist(), int(self.chunks[group])
        image, label, _ = self._columns
        with _opened(self._file(file), self.access) as parquet:
            columns = [image] if label is None else [image, label]
            table = _read(parquet, number, columns, most=8 * self._expected(group) + _SLACK)
            if table.num_rows != rows:
                raise ValueError(f"row group {number} has {table.num_rows:,} rows and had {rows:,}")
            return table.column(image), None if label is None else label_values(table.column(label))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_labels": None}


@contextmanager
def _opened(file: _File, access: Access) -> Iterator[pq.ParquetFile]:
    """A file and its footer. Raises Unreachable where the disk or the network is at fault, DataError where the file is."""
    where = shown(file.path)
    try:
        with pa.PythonFile(_Remote(file, access), "r") if is_url(file.path) else pa.OSFile(file.path) as opened:
            yield pq.ParquetFile(opened, metadata=_footer(file, access) if is_url(file.path) else None)
    except OSError as error:
        kind = Unreachable if error.errno else DataError
        raise kind(f"{where}: cannot be read ({reason(error)}); put it back, or take it out of the path") from None
    except (pa.ArrowException, ValueError, LookupError) as error:
        raise DataError(f"{where}: is damaged, changed, or no parquet file ({reason(error)}); fetch it again") from None


@lru_cache(256)
def _footer(file: _File, access: Access) -> pq.FileMetaData:
    """Kept, since each row group of a remote file would ask for it again."""
    return pq.read_metadata(pa.PythonFile(_Remote(file, access), "r"))


def _read(parquet: pq.ParquetFile, group: int, columns: list[str], *, most: int) -> pa.Table:
    """Some columns of a row group. Raises ValueError for more than ``most`` bytes."""
    batches, size = [], 0
    for batch in parquet.iter_batches(batch_size=256, row_groups=[group], columns=columns, use_threads=False):
        if (size := size + batch.nbytes) > most:
            raise ValueError(f"row group {group} has more than {most:,} bytes, and far fewer by its footer")
        batches.append(batch)
    return pa.Table.from_batches(batches)


def _look(path: str, access: Access) -> tuple[str, Columns, list[_Group]]:
    """(identity, columns, row groups) of a file, from its ends."""
    try:
        file = _File(path, identity_of(path, access))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); correct the path") from None
    groups, first = [], 0
    with _opened(file, access) as parquet:
        columns, facts = find_columns(parquet.schema_arrow, where=shown(path)), parquet.metadata
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
            groups.append(_Group(place, first, group.num_rows, size, unlabelled, largest))
            first += group.num_rows
    return file.identity, columns, groups


def _labels_of(parquet: pq.ParquetFile, group: int, name: str, leaf: int) -> tuple[int, int]:
    """(rows without a label, largest label) of a row group; its label column is read only where statistics do not say it."""
    known = parquet.metadata.row_group(group).column(leaf).statistics
    if known is not None and known.has_null_count and known.has_min_max and known.min >= 0:
        return known.null_count, known.max
    labels = label_values(parquet.read_row_group(group, columns=[name], use_threads=False).column(name))
    return int((labels < 0).sum()), int(labels.max())


def _names(files: Sequence[str]) -> list[str]:
    """The files below the folder that all of them lie in."""
    paths = [parted(file) if is_url(file) else os.path.split(os.path.abspath(file)) for file in files]
    levels = zip(*(folder.split("/") for folder, _ in paths), strict=False)
    shared = len(list(itertools.takewhile(lambda names: len(set(names)) == 1, levels)))
    return ["/".join([*folder.split("/")[shared:], name]) for folder, name in paths]


def _told(columns: Columns) -> str:
    classes = "" if columns.classes is None else f" of {len(columns.classes)} classes"
    return f"image {columns.image}, " + (f"label {columns.label}{classes}" if columns.label else "no label")


def _bytes(chunk: tuple[pa.ChunkedArray, NDArray[np.int64] | None]) -> int:
    return chunk[0].nbytes
