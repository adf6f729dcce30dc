"""Tar shards, read at member offsets through their sidecar index: local ones image by image, remote ones a chunk a request.

Chunks are runs of samples of one shard. Surprising: the order of the samples is the order of the list, so patterns are
expanded sorted, and a shard added at the end changes the order of a run but no sample's id.
"""

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitssl.data import remote
from vitssl.data.buffer import ChunkBuffer
from vitssl.data.counts import read_wids
from vitssl.data.index import ShardIndex
from vitssl.data.labelsets import shard_labels
from vitssl.data.manifest import index_shards
from vitssl.data.order import default_chunk
from vitssl.data.sources.base import DEFAULT_MEMORY, MAX_BYTES, UNREAD, Ahead, Raw, cut, fingerprint, printable
from vitssl.data.sources.patterns import find_shards, shortened
from vitssl.data.sources.several import LabelSets, label_sets
from vitssl.data.stores import USUAL, Access, Passing, is_url, parted, shown
from vitssl.errors import ConfigError, DataError

Chunk = list[tuple[int, bytes]]
"""(offset in the shard, bytes), by offset."""
_OPEN = 128  # descriptors a process keeps
_LOCKS = 64  # so many shards can be opened at once
_MAPPED = 128  # sidecars it keeps mapped, each with a descriptor


class ShardSource:
    """Shards named by a brace pattern (``{000..099}``), a glob, a folder of tars, one tar, urls, or a list of these.

    ``progress(shards done, shards in all)`` is called while the index is built. Raises ConfigError for urls that are not
    allowed and patterns that do not expand, and DataError for shards that are missing, empty, truncated, compressed or damaged.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        *,
        access: Access = USUAL,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.name = shortened(path)
        counts = read_wids(path, access) if isinstance(path, str) and parted(path)[1].lower().endswith(".json") else {}
        shards = list(counts) or find_shards(path, access)
        if len({is_url(shard) for shard in shards}) > 1:
            raise ConfigError(f"{self.name}: some shards are local and some are not; name them apart, in data.sources")
        self._common = _common({parted(shard)[0] for shard in shards})
        self.manifest = index_shards(shards, access=access, progress=progress, counts=counts)
        rows = self.manifest.rows
        counts = rows["samples"]
        self.num_samples, self.ignored = int(counts.sum()), int(rows["ignored"].sum())
        self.num_unlabelled = int(rows["unlabelled"].sum())
        self.fingerprint = self._fingerprint()
        self.labels = self.num_unlabelled == 0
        self.classes = self._names_of(self.label_array) if self.labels else None
        self.by_chunk = is_url(self.manifest.shards[0])
        sized = rows["size"] > 0
        self.mean_bytes = int(rows["size"][sized].sum()) // max(1, int(counts[sized].sum()))
        self._starts = np.cumsum(counts) - counts
        self.recut(default_chunk(self.num_samples, self.mean_bytes if self.by_chunk else None))
        self._buffer, self._locks = self._new_buffer(), (-1, [])
        self._files: OrderedDict[int, int] = OrderedDict()
        self._indexes: dict[int, ShardIndex | str] = {}  # shared with the threads that fetch chunks

    def read(self, ids: Sequence[int], ahead: Ahead | None = None) -> list[Raw]:
        """The samples of these ids, in this order, each with its bytes or its problem."""
        ids = np.asarray(ids, dtype=np.int64)
        memory = ahead.memory if ahead else DEFAULT_MEMORY
        if self.by_chunk:
            soon = np.concatenate([ids, ahead.ids]) if ahead else ids
            self._buffer.expect(dict.fromkeys(self._chunk_of(soon).tolist()), limit=memory)
        shards = np.searchsorted(self._starts, ids, side="right") - 1
        places = ids - self._starts[shards]
        chunks = self._chunk_of(ids).tolist() if self.by_chunk else [0] * len(ids)
        return [self._read(*each, memory) for each in zip(shards.tolist(), places.tolist(), chunks, strict=True)]

    def recut(self, chunk: int) -> None:
        """Chunks of ``chunk`` samples from now on. Nothing may have been read yet."""
        self.chunk, self.chunks = chunk, cut(self.manifest.rows["samples"], chunk)
        self._chunk_starts = np.cumsum(self.chunks) - self.chunks

    def label_array(self) -> NDArray[np.int64] | None:
        """[N] labels, or None unless every sample has one (``num_unlabelled`` counts those that have none)."""
        if not self.labels:
            return None
        return np.concatenate([self.manifest.open(number).records["label"] for number in range(len(self.manifest.shards))])

    def label_sets(self) -> LabelSets:
        """The labels of all samples, several each. Raises DataError for shards that lie elsewhere, and where some has none."""
        if is_url(self.manifest.shards[0]):
            raise DataError(f"{self.name}: labels=several reads local shards; copy them to a disk")
        indexes = [self.manifest.open(number) for number in range(len(self.manifest.shards))]
        found = [shard_labels(index.shard, index.identity, index.num_samples) for index in indexes]
        counts, labels = (np.concatenate(part) for part in zip(*found, strict=True))
        return label_sets(counts, labels, self._names_of(lambda: labels))

    def stamp(self) -> bytes:
        """See :func:`vitssl.data.sources.base.stamp`."""
        return self.manifest.rows["mtime"].tobytes()

    def _fingerprint(self) -> str:
        """Of the shards' bytes (a mark where some are only counted), a dot, and of their names and counts."""
        rows = self.manifest.rows
        counts = fingerprint([*rows["name"].tolist(), rows["samples"].tobytes()])
        return f"{UNREAD if self.manifest.counted.any() else fingerprint(rows['identity'].tolist())}.{counts}"

    def _names_of(self, labels: Callable[[], NDArray[np.int64]]) -> tuple[str, ...] | None:
        """The class names of the ``about.json`` beside the shards, where there is one; only then are the labels looked at."""
        about = "/".join((parted(self.manifest.shards[0])[0] or ".", "about.json"))
        try:
            content = remote.small_file(about, self.manifest.access) if is_url(about) else Path(about).read_bytes()
            classes = json.loads(content or b"{}")["classes"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not isinstance(classes, list):
            return None
        if (largest := int(labels().max(initial=-1))) >= len(classes):
            where = f"{shown(about)}: names {len(classes)} classes"
            raise DataError(f"{where}, and there is a label {largest}; correct it or remove it")
        return tuple(map(str, classes))

    def _read(self, number: int, place: int, chunk: int, memory: int) -> Raw:
        name, key, where, label = self._name(number), f"number {place:,}", "", None
        try:
            shard = self._index(number)
            key, offset, length, label, extension = shard.records[place].tolist()
            key, label = key.decode("utf-8", "replace"), label if label >= 0 else None
            where = f"{shown(shard.shard)}: {printable(key)}.{extension.decode('ascii', 'replace')} (byte {offset:,})"
            if length > MAX_BYTES:
                raise DataError(f"has {length:,} bytes, more than {MAX_BYTES:,}; take it out")
            if self.by_chunk:
                image = _part(self._buffer.get(chunk, limit=memory), offset, length)
            else:
                image = os.pread(self._descriptor(number), length, offset)
            if len(image) < length:
                raise DataError("the shard ends before this image does; it changed since the run started: restore it")
        except OSError as error:
            reason = f"cannot be read ({error.strerror or error}); put the shard back and start again"
            return Raw(f"{name}/{key}", b"", label, where, f"{where}: {reason}", passing=True)
        except DataError as error:
            reason = str(error) if not where or shown(self.manifest.shards[number]) in str(error) else f"{where}: {error}"
            return Raw(f"{name}/{key}", b"", label, where, reason, passing=isinstance(error, Passing))
        return Raw(f"{name}/{key}", image, label, where)

    def _name(self, number: int) -> str:
        """A shard's own in keys: its path below the folder that all of them lie in."""
        return "/".join(parted(self.manifest.shards[number]))[self._common :].lstrip("/")

    def _chunk_of(self, ids: NDArray) -> NDArray:
        return np.searchsorted(self._chunk_starts, ids, side="right") - 1

    def _fetch(self, chunk: int) -> Chunk:
        """The bytes of a remote chunk: from its first image to its last, or image by image where most lies between."""
        first = int(self._chunk_starts[chunk])
        number = int(np.searchsorted(self._starts, first, side="right")) - 1
        place = first - int(self._starts[number])
        records = self._index(number).records[place : place + int(self.chunks[chunk])]
        records = records[records["length"] <= MAX_BYTES]
        if not len(records):
            return []
        start, stop = int(records["offset"].min()), int((records["offset"] + records["length"]).max())
        shard, size = self.manifest.shards[number], int(self.manifest.rows["size"][number])
        size = size if size >= 0 else None
        spans = [(start, stop - start)]
        if stop - start > 2 * int(records["length"].sum()) + (1 << 20):
            spans = [(int(record["offset"]), int(record["length"])) for record in records]
        options = {"identity": self._index(number).identity}
        return [(first, remote.read(shard, first, length, size, self.manifest.access, **options)) for first, length in spans]

    def _new_buffer(self) -> ChunkBuffer:
        return ChunkBuffer(self._fetch, size=_bytes, expected=self._expected)

    def _expected(self, chunk: int) -> int:
        return int(self.chunks[chunk]) * self.mean_bytes

    def _index(self, number: int) -> ShardIndex:
        found = self._indexes.get(number)
        if found is None:
            if self._locks[0] != os.getpid():  # a lock that a fork copied may be held by a thread that is not here
                self._locks = os.getpid(), [threading.Lock() for _ in range(_LOCKS)]
            with self._locks[1][number % _LOCKS]:  # a shard may have to be fetched for it: others need not wait
                found = self._indexes.get(number) or self._opened(number)
                self._indexes[number] = found
            for other in list(self._indexes)[:-_MAPPED]:
                self._indexes.pop(other, None)
        if isinstance(found, str):
            raise DataError(found)
        return found

    def _opened(self, number: int) -> ShardIndex | str:
        """A shard's index, or why there is none and will be none."""
        try:
            return self.manifest.open(number)
        except Passing:
            raise
        except DataError as error:
            return str(error)

    def _descriptor(self, number: int) -> int:
        if number not in self._files:
            self._files[number] = os.open(self.manifest.shards[number], os.O_RDONLY | os.O_CLOEXEC)
            if len(self._files) > _OPEN:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(number)
        return self._files[number]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": OrderedDict(), "_indexes": {}, "_buffer": None, "_locks": (-1, [])}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self._buffer = self._new_buffer()

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)


def _common(folders: set[str]) -> int:
    """Length of the folder that all of these lie in."""
    levels = list(zip(*(folder.split("/") for folder in folders)))
    shared = next((number for number, names in enumerate(levels) if len(set(names)) > 1), len(levels))
    return len("/".join(names[0] for names in levels[:shared]))


def _bytes(chunk: Chunk) -> int:
    return sum(len(content) for _, content in chunk)


def _part(chunk: Chunk, offset: int, length: int) -> bytes:
    first, content = next(piece for piece in reversed(chunk) if piece[0] <= offset)
    return content[offset - first : offset - first + length]
