"""Tar shards on local disks, read at member offsets through their sidecar index; nothing is buffered.

Chunks are runs of samples of one shard. Surprising: the order of the samples is the order of the list, so patterns are
expanded sorted, and a shard added at the end changes the order of a run but no sample's id.
"""

import glob
import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from vitssl.data.index import SUFFIX, ShardIndex
from vitssl.data.manifest import NAME, index_shards
from vitssl.data.order import default_chunk
from vitssl.data.sources.base import Raw, fingerprint
from vitssl.errors import ConfigError, DataError

_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # compressed ones too: refused, not overlooked
_OPEN = 128  # descriptors a process keeps
_MAPPED = 1024  # sidecars it keeps mapped


class ShardSource:
    """Shards named by a brace pattern (``{000..099}``), a glob, a list of these, a folder of tars or one tar.

    ``progress(shards done, shards in all)`` is called while the index is built. Raises ConfigError for urls and patterns that
    do not expand, and DataError for shards that are missing, empty, truncated, compressed or damaged.
    """

    def __init__(self, path: str | Sequence[str], *, progress: Callable[[int, int], None] | None = None) -> None:
        self.name = path if isinstance(path, str) else _shortened(path)
        self.manifest = index_shards(find_shards(path), progress=progress)
        rows = self.manifest.rows
        counts = rows["samples"]
        self.num_samples, self.ignored = int(counts.sum()), int(rows["ignored"].sum())
        self.num_unlabelled = int(rows["unlabelled"].sum())
        self.fingerprint = fingerprint(rows["identity"].tolist())
        self.labels = self.num_unlabelled == 0
        self.classes = self._class_names() if self.labels else None
        self.chunks = _chunks(counts, default_chunk(self.num_samples))
        self._starts = np.cumsum(counts) - counts
        self._files: OrderedDict[int, int] = OrderedDict()
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()

    def read(self, ids: Sequence[int]) -> list[Raw]:
        """The samples of these ids, in this order. Raises DataError where a shard is gone or shorter than its index says."""
        ids = np.asarray(ids, dtype=np.int64)
        shards = np.searchsorted(self._starts, ids, side="right") - 1
        places = ids - self._starts[shards]
        return [self._read(shard, place) for shard, place in zip(shards.tolist(), places.tolist(), strict=True)]

    def label_array(self) -> NDArray[np.int64] | None:
        """[N] labels, or None unless every sample has one (``num_unlabelled`` counts those that have none)."""
        if not self.labels:
            return None
        return np.concatenate([self.manifest.open(number).records["label"] for number in range(len(self.manifest.shards))])

    def _class_names(self) -> tuple[str, ...] | None:
        """The class names of the ``about.json`` beside the shards, where there is one."""
        about = os.path.join(os.path.dirname(self.manifest.shards[0]), "about.json")
        try:
            with open(about, encoding="utf-8") as file:
                classes = json.load(file)["classes"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not isinstance(classes, list):
            return None
        if (largest := int(self.label_array().max())) >= len(classes):
            raise DataError(f"{about}: names {len(classes)} classes, and there is a label {largest}; correct it or remove it")
        return tuple(map(str, classes))

    def _read(self, number: int, place: int) -> Raw:
        shard = self._index(number)
        key, offset, length, label, extension = shard.records[place].tolist()
        key = key.decode("utf-8", "replace")
        where = f"{shard.shard}: {key}.{extension.decode()} (byte {offset:,})"
        try:
            image = os.pread(self._descriptor(number), length, offset)
        except OSError as error:
            raise DataError(
                f"{where}: cannot be read ({error.strerror or error}); put the shard back and start again"
            ) from None
        if len(image) < length:
            raise DataError(f"{where}: the shard ends before this image does; it changed since the run started: restore it")
        return Raw(key=f"{os.path.basename(shard.shard)}/{key}", image=image, label=label if label >= 0 else None, where=where)

    def _index(self, number: int) -> ShardIndex:
        if number not in self._indexes:
            self._indexes[number] = self.manifest.open(number)
            if len(self._indexes) > _MAPPED:
                self._indexes.popitem(last=False)
        self._indexes.move_to_end(number)
        return self._indexes[number]

    def _descriptor(self, number: int) -> int:
        if number not in self._files:
            self._files[number] = os.open(self.manifest.shards[number], os.O_RDONLY | os.O_CLOEXEC)
            if len(self._files) > _OPEN:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(number)
        return self._files[number]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": OrderedDict(), "_indexes": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)


def find_shards(path: str | Sequence[str]) -> list[str]:
    """The local shards that a brace pattern, a glob, a folder, a file or a list of these names, in order."""
    if isinstance(path, str):
        return _expand(path)
    if not path:
        raise ConfigError("the list of shards is empty; name at least one")
    return [shard for each in path for shard in _expand(each)]


def is_shard(name: str) -> bool:
    """Whether a file name is that of a tar."""
    return name.lower().endswith(_SUFFIXES) and not name.startswith(".")


def _may_be_shard(path: str) -> bool:
    """Whether a path that a pattern met is none of the files that indexing leaves beside shards."""
    return not (path.endswith(SUFFIX) or os.path.basename(path) == NAME)


def _expand(pattern: str) -> list[str]:
    if re.match(r"pipe:|[a-z][a-z0-9+.-]*://", pattern, flags=re.IGNORECASE):
        raise ConfigError(
            f"{pattern!r}: shards are read from local disks only, no url and no pipe; copy them and name their path"
        )
    if os.path.isdir(pattern):
        shards = [os.path.join(pattern, name) for name in sorted(os.listdir(pattern)) if is_shard(name)]
        if not shards:
            raise DataError(f"{pattern}: this folder holds no tar shards ({_holds(pattern)}); correct the path")
        return shards
    if os.path.exists(pattern):
        return [pattern]
    from webdataset.shardlists import expand_urls  # imports torch's data loading: only where a pattern is to be expanded

    try:
        expanded = expand_urls(pattern)
    except ValueError as error:
        raise ConfigError(f"{pattern!r}: braces do not match ({error}); write ranges as {{000..099}}") from None
    shards, missing = [], []
    for each in expanded:
        found = [each] if os.path.isfile(each) else sorted(filter(_may_be_shard, glob.glob(each)))
        shards += found
        missing += [] if found else [each]
    if missing:
        folder = os.path.dirname(missing[0]) or "."
        what = "nothing is there"
        if len(expanded) > 1:
            what = f"{len(missing)} of {len(expanded)} shards are missing, the first is {missing[0]}"
        raise DataError(f"{pattern}: {what}; {folder} {_holds(folder)}: correct the path")
    return shards


def _holds(folder: str) -> str:
    """What a folder holds, in words, for a message about what it does not."""
    if not os.path.isdir(folder):
        return "is not a folder"
    names = sorted(os.listdir(folder))
    shards = [name for name in names if is_shard(name)]
    if not shards:
        return f"holds {len(names)} files and no tar"
    return f"holds {len(shards)} tars, {shards[0]} to {shards[-1]}"


def _chunks(counts: NDArray, size: int) -> NDArray[np.int64]:
    """Each shard cut into chunks of ``size`` samples, the rest spread so that no chunk is a crumb."""
    pieces = -(-counts // size)  # per shard
    shard = np.repeat(np.arange(len(counts)), pieces)
    place = np.arange(len(shard)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return counts[shard] * (place + 1) // pieces[shard] - counts[shard] * place // pieces[shard]


def _shortened(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more" if paths else "no shards"
