"""The manifest of a list of shards: a row each of counts and identity, which is all that memory holds of them.

A folder's rows lie in one file beside its shards (or in the cache), so a hundred thousand shards open with one read and a
``stat`` each: a shard of the same size and time as in its row is the same. Rows that are missing or stale are made from the
shards' sidecars (:mod:`vitssl.data.index`), which are built where there are none.
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitssl.data.index import ShardIndex, build_index, cached, load_index, replace_file
from vitssl.data.pool import side_by_side
from vitssl.errors import DataError

VERSION = 1
NAME = "vitssl.manifest"
_COUNTS = [(name, "<i8") for name in ("size", "mtime", "samples", "unlabelled", "ignored")]


def row_type(name_bytes: int) -> np.dtype:
    """One shard: its file name, the hash of its ends with its size, size in bytes, time in ns, and the counts of its index."""
    return np.dtype([("name", f"S{max(1, name_bytes)}"), ("identity", "S56"), *_COUNTS])


@dataclass
class Manifest:
    """``rows`` [S] of :func:`row_type` for ``shards`` [S], paths in the order of the run."""

    shards: list[str]
    rows: NDArray
    kept: dict[int, ShardIndex] = field(default_factory=dict)  # indexes that no place could be found for

    def open(self, number: int) -> ShardIndex:
        """The index of a shard. Raises DataError where it is no longer the one that this manifest counted."""
        if number in self.kept:
            return self.kept[number]
        found = load_index(self.shards[number], identity=self.rows["identity"][number].decode())
        if found is None:
            raise DataError(f"{self.shards[number]}: its index changed while in use; leave the shards alone and start again")
        return found


def index_shards(
    shards: Sequence[str], *, progress: Callable[[int, int], None] | None = None, processes: int | None = None
) -> Manifest:
    """The manifest of a list of shards; indexes that are missing or stale are built, with ``processes`` side by side.

    ``progress(shards done, shards in all)`` is called as they finish; ``processes`` defaults to one per CPU, at most 16.
    Raises DataError naming the shard: missing, empty, truncated, compressed, damaged, a sample without an image, a bad label.
    """
    shards = list(shards)
    folders: dict[str, list[int]] = defaultdict(list)
    for number, shard in enumerate(shards):
        folders[os.path.dirname(shard)].append(number)
    names = np.array([os.fsencode(os.path.basename(shard)) for shard in shards])
    rows = np.zeros(len(shards), row_type(names.itemsize))
    rows["name"] = names
    rows["size"], rows["mtime"] = np.array([_stat(shard) for shard in shards], dtype=np.int64).T
    fresh = np.zeros(len(shards), dtype=bool)
    for folder, numbers in folders.items():
        _take(rows, fresh, np.array(numbers), _read(folder))
    stale = np.flatnonzero(~fresh).tolist()
    found = {number: load_index(shards[number]) for number in stale}
    missing = [number for number, index in found.items() if index is None]
    if progress is not None:
        progress(len(shards) - len(missing), len(shards))
    processes = min(processes or os.cpu_count() or 1, 16)
    built = side_by_side(build_index, [shards[number] for number in missing], processes)
    for done, (number, index) in enumerate(zip(missing, built, strict=True), start=1):
        found[number] = index
        if progress is not None:
            progress(len(shards) - len(missing) + done, len(shards))
    for number, index in found.items():
        counts = (index.num_samples, index.num_unlabelled, index.ignored)
        rows["identity"][number] = index.identity.encode()
        rows["samples"][number], rows["unlabelled"][number], rows["ignored"][number] = counts
    for folder in {os.path.dirname(shards[number]) for number in stale}:
        _merge(folder, rows[folders[folder]])
    return Manifest(shards, rows, {number: index for number, index in found.items() if index.sidecar is None})


def _stat(shard: str) -> tuple[int, int]:
    try:
        found = os.stat(shard)
    except OSError:
        return -1, -1  # no row is like this; who scans it says what is wrong
    return found.st_size, found.st_mtime_ns


def _take(rows: NDArray, fresh: NDArray, numbers: NDArray, known: NDArray) -> None:
    """Fill the rows of these shards from the folder's ``known`` rows (sorted by name) where size and time are the same."""
    if not len(known):
        return
    wanted = rows[numbers]
    places = np.minimum(np.searchsorted(known["name"], wanted["name"]), len(known) - 1)
    match = known[places]
    same = (match["name"] == wanted["name"]) & (match["size"] == wanted["size"]) & (match["mtime"] == wanted["mtime"])
    for column in ("identity", "samples", "unlabelled", "ignored"):
        rows[column][numbers[same]] = match[column][same]
    fresh[numbers] = same


def _places(folder: str) -> tuple[Path, Path]:
    """Where a folder's manifest may lie, in order of preference."""
    return Path(folder, NAME), cached(folder or ".", ".manifest")


def _read(folder: str) -> NDArray:
    """The folder's rows, sorted by name; none where there is no manifest, or one that is damaged or of another version."""
    for path in _places(folder):
        try:
            line, _, content = path.read_bytes().partition(b"\n")
            head = json.loads(line)
            if head["format"] == "vitssl-manifest" and head["version"] == VERSION:
                return np.frombuffer(content, row_type(head["name_bytes"]), count=head["shards"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return np.empty(0, row_type(1))


def _merge(folder: str, rows: NDArray) -> None:
    """Write the folder's manifest anew: these rows, and those it has of other shards that are still there."""
    known = _read(folder)
    others = known[~np.isin(known["name"], rows["name"])]
    others = (
        others[[os.path.exists(os.path.join(folder, os.fsdecode(name))) for name in others["name"]]] if len(others) else others
    )
    width = max(rows["name"].itemsize, others["name"].itemsize)
    merged = np.concatenate([each.astype(row_type(width)) for each in (rows, others)])
    merged = merged[np.argsort(merged["name"], kind="stable")]
    head = {"format": "vitssl-manifest", "version": VERSION, "name_bytes": width, "shards": len(merged)}
    for path in _places(folder):
        try:
            replace_file(path, json.dumps(head).encode() + b"\n" + merged.tobytes())
            return
        except OSError:
            continue  # not writable, or full: the next place
