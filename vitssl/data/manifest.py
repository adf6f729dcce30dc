"""The manifest of a list of shards: a row each of counts and identity, which is all that memory holds of them.

A folder's rows lie in one file beside its shards (or in the cache), so a hundred thousand shards open with one read and a
``stat`` each: a shard of the same size and time as in its row is the same. Rows that are missing or stale are made from the
shards' sidecars (:mod:`vitssl.data.index`), which are built where there are none. Of shards that lie elsewhere a row is
believed, or a hundred thousand questions would come before the first image; reading one that has another size says so.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitssl.data import remote
from vitssl.data.counts import counts_beside
from vitssl.data.index import ShardIndex, build_index, cached, index_once, load_index, replace_file
from vitssl.data.pool import side_by_side
from vitssl.data.stores import USUAL, Access, Passing, is_url, parted, shown, unsigned
from vitssl.errors import ConfigError, DataError

VERSION = 1
NAME = "vitssl.manifest"
_MOST = 1 << 48  # of anything that is counted: more is a lie, or damage
_COUNTED = "counted"  # begins the identity of a shard of which only the number of samples is known
_COUNTS = [(name, "<i8") for name in ("size", "mtime", "samples", "unlabelled", "ignored")]


def row_type(name_bytes: int) -> np.dtype:
    """One shard: its file name, the hash of its ends with its size, size in bytes, time in ns, and the counts of its index."""
    return np.dtype([("name", f"S{max(1, name_bytes)}"), ("identity", "S56"), *_COUNTS])


@dataclass
class Manifest:
    """``rows`` [S] of :func:`row_type` for ``shards`` [S], paths in the order of the run."""

    shards: list[str]
    rows: NDArray
    access: Access = USUAL
    kept: dict[int, ShardIndex] = field(default_factory=dict)  # indexes that no place could be found for

    @property
    def counted(self) -> NDArray[np.bool_]:
        """[S] whether nothing but the number of a shard's samples is known yet."""
        return _only_counted(self.rows)

    def open(self, number: int) -> ShardIndex:
        """The index of a shard. Raises DataError where it is no longer the one that this manifest counted."""
        if number in self.kept:
            return self.kept[number]
        shard, identity = self.shards[number], self.rows["identity"][number].decode("ascii", "replace")
        if counted := identity.startswith(_COUNTED):
            identity = None
        found = load_index(shard, identity=identity, access=self.access)
        if found is None and is_url(shard):  # the manifest came with the data, the sidecar did not
            found = index_once(shard, self.access)
            if not counted and found.identity != identity:
                raise Passing(f"{shown(shard)}: changed since it was indexed; run  vitssl index  again")
        if found is not None and found.num_samples != (said := int(self.rows["samples"][number])):
            what = "correct the count" if counted else "run  vitssl index  again"
            raise DataError(f"{shown(shard)}: holds {found.num_samples:,} samples, {said:,} were counted; {what}")
        if found is None:
            raise DataError(f"{shard}: its index changed while in use; leave the shards alone and start again")
        return found


def index_shards(
    shards: Sequence[str],
    *,
    access: Access = USUAL,
    progress: Callable[..., None] | None = None,
    processes: int | None = None,
    fresh: bool = False,
    counts: Mapping[str, int] | None = None,
) -> Manifest:
    """The manifest of a list of shards; indexes that are missing or stale are built, with ``processes`` side by side.

    ``progress(shards done, shards in all)`` is called as they finish, first with a ``note`` where remote bytes are to be read;
    ``processes`` defaults to one per CPU, at most 16.
    ``fresh`` looks at remote shards again instead of believing their manifest; ``counts`` of samples, or a ``sizes.json``
    beside them, spare remote shards the indexing until they are read. Raises DataError naming the shard: missing, empty,
    truncated, compressed, damaged, a sample without an image, a bad label; ConfigError where more bytes would have to come over
    the network than ``access.index_budget``.
    """
    shards = list(shards)
    folders: dict[str, list[int]] = defaultdict(list)
    places = [parted(shard) for shard in shards]
    for number, (folder, _) in enumerate(places):
        folders[folder].append(number)
    names = np.array([os.fsencode(name) for _, name in places])
    rows = np.zeros(len(shards), row_type(names.itemsize))
    rows["name"] = names
    _refuse_twice(shards, folders, names)
    rows["size"], rows["mtime"] = np.array([_stat(shard) for shard in shards], dtype=np.int64).T
    known = np.zeros(len(shards), dtype=bool)
    for folder, numbers in folders.items():
        if not (fresh and is_url(folder)):
            _take(rows, known, np.array(numbers), read_manifest(folder, access))
    stale = np.flatnonzero(~known).tolist()
    if not fresh:
        stale = _counted(shards, stale, rows, counts or {}, access)
    found = _load(shards, stale, rows, access)
    missing = [number for number, index in found.items() if index is None]
    far = _estimate([shards[number] for number in missing], rows["size"][missing], access)
    if progress is not None:
        said = {"note": f"indexing reads {far / 1e9:,.2f} GB of remote shards, this once"} if far else {}
        progress(len(shards) - len(missing), len(shards), **said)
    processes = min(processes or os.cpu_count() or 1, 16)
    built = side_by_side(partial(build_index, access=access), [shards[number] for number in missing], processes)
    for done, (number, index) in enumerate(zip(missing, built, strict=True), start=1):
        found[number] = index
        if progress is not None:
            progress(len(shards) - len(missing) + done, len(shards))
    for number, index in found.items():
        counts = (index.num_samples, index.num_unlabelled, index.ignored)
        rows["identity"][number] = index.identity.encode()
        rows["samples"][number], rows["unlabelled"][number], rows["ignored"][number] = counts
    for folder in {parted(shards[number])[0] for number in found}:
        mine = rows[folders[folder]]
        _merge(folder, mine[~_only_counted(mine)], access)
    return Manifest(shards, rows, access, {number: index for number, index in found.items() if index.sidecar is None})


def _refuse_twice(shards: list[str], folders: Mapping[str, list[int]], names: NDArray) -> None:
    """Raise ConfigError where two shards are one."""
    for numbers in folders.values():
        found, first, counts = np.unique(names[numbers], return_index=True, return_counts=True)
        if len(found) < len(numbers):
            twice = shown(shards[numbers[first[counts.argmax()]]])
            raise ConfigError(
                f"{twice}: is listed {counts.max()} times (a url's query does not count); list it once, and to see it"
                " more often name it apart in data.sources, with a weight"
            )


def _only_counted(rows: NDArray) -> NDArray[np.bool_]:
    return np.char.startswith(rows["identity"], _COUNTED.encode())


def _load(shards: list[str], numbers: list[int], rows: NDArray, access: Access) -> dict[int, ShardIndex | None]:
    """The indexes that there are of these shards; sizes of remote ones are asked for and noted in ``rows``."""

    def ask(number: int) -> ShardIndex | None:
        if is_url(shards[number]):
            rows["size"][number] = remote.stat(shards[number], access).size
        found = load_index(shards[number], access=access)
        if found is not None and found.sidecar is not None:
            found._records = None  # a map keeps its descriptor: only the counts are wanted here
        return found

    if not any(is_url(shards[number]) for number in numbers):
        return {number: ask(number) for number in numbers}
    with ThreadPoolExecutor(32) as pool:
        return dict(zip(numbers, pool.map(ask, numbers), strict=True))


def _counted(shards: list[str], stale: list[int], rows: NDArray, counts: Mapping[str, int], access: Access) -> list[int]:
    """Fill the rows of remote shards whose samples somebody counted; returns the others. Their labels are not known.

    The sizes of some are asked for, which is enough for a mean; that of the others stays below 0.
    """
    far = [number for number in stale if is_url(shards[number]) and not shards[number].startswith("pipe:")]
    known = {number: counts[shards[number]] for number in far if shards[number] in counts}
    for folder in {parted(shards[number])[0] for number in far if number not in known}:
        beside = counts_beside(folder, access)
        for number in far:
            place, name = parted(shards[number])
            if place == folder and name in beside:
                known.setdefault(number, beside[name])
    for number, count in known.items():
        rows["samples"][number] = rows["unlabelled"][number] = count
        name = f"{unsigned(shards[number])} {count}".encode("utf-8", "surrogateescape")
        rows["identity"][number] = f"{_COUNTED}-{hashlib.blake2b(name, digest_size=16).hexdigest()}".encode()
    for number in list(known)[:: -(-len(known) // 64)] if known else ():
        rows["size"][number] = remote.stat(shards[number], access).size
    return [number for number in stale if number not in known]


def _estimate(missing: list[str], sizes: NDArray, access: Access) -> int:
    """Bytes that indexing reads over the network. Raises ConfigError where they are more than the budget."""
    far = [(shard, int(size)) for shard, size in zip(missing, sizes.tolist(), strict=True) if is_url(shard)]
    total = sum(size for _, size in far)
    if total > access.index_budget:
        where = shown(parted(far[0][0])[0])
        raise ConfigError(
            f"{where}: {len(far):,} shards have no index yet, which takes reading {total / 1e9:,.1f} GB of them once, and"
            f" data.index_budget is {access.index_budget / 1e9:g} GB; run  vitssl index '{shown(far[0][0])}' ...  first, where"
            " the shards are near, or raise the budget"
        )
    return total


def _stat(shard: str) -> tuple[int, int]:
    if is_url(shard):
        return -1, 0
    try:
        found = os.stat(shard)
    except OSError:
        return -1, -1  # no row is like this; who scans it says what is wrong
    return found.st_size, found.st_mtime_ns


def _take(rows: NDArray, fresh: NDArray, numbers: NDArray, known: NDArray) -> None:
    """Fill the rows of these shards from the folder's ``known`` rows (sorted by name) where size and time are the same.

    A remote shard (size -1) is believed to be as it was.
    """
    if not len(known):
        return
    wanted = rows[numbers]
    places = np.minimum(np.searchsorted(known["name"], wanted["name"]), len(known) - 1)
    match = known[places]
    unchanged = (match["size"] == wanted["size"]) & (match["mtime"] == wanted["mtime"])
    same = (match["name"] == wanted["name"]) & (unchanged | ((wanted["size"] < 0) & (wanted["mtime"] == 0)))
    for column in ("identity", "size", "samples", "unlabelled", "ignored"):
        rows[column][numbers[same]] = match[column][same]
    fresh[numbers] = same


def _places(folder: str) -> tuple[Path, ...]:
    """Where a folder's manifest may lie, in order of preference."""
    near = cached(folder or ".", ".manifest")
    return (near,) if is_url(folder) else (Path(folder, NAME), near)


def read_manifest(folder: str, access: Access = USUAL) -> NDArray:
    """The folder's rows, sorted by name; none where there is no manifest, or one that is damaged or of another version."""
    for path in _places(folder):
        try:
            rows = _parsed(path.read_bytes())
        except OSError:
            continue
        if rows is not None:
            return rows
    if is_url(folder) and (content := remote.small_file(f"{folder}/{NAME}", access)) is not None:
        rows = _parsed(content)
        if rows is not None and (rows["size"] > 0).all() and (rows["samples"] > 0).all():
            return rows
    return np.empty(0, row_type(1))


def _parsed(content: bytes) -> NDArray | None:
    line, _, content = content.partition(b"\n")
    try:
        head = json.loads(line)
        if head["format"] == "vitssl-manifest" and head["version"] == VERSION:
            rows = np.frombuffer(content, row_type(head["name_bytes"]), count=head["shards"])
            counts = [rows[name] for name in ("samples", "unlabelled", "ignored", "size")]
            if all(((each >= 0) & (each < _MOST)).all() for each in counts) and rows["samples"].sum() < _MOST:
                return rows
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        pass
    return None


def _merge(folder: str, rows: NDArray, access: Access) -> None:
    """Write the folder's manifest anew: these rows, and those it has of other shards that are still there."""
    known = read_manifest(folder, access)
    others = known[~np.isin(known["name"], rows["name"])]
    if len(others) and not is_url(folder):
        others = others[[os.path.exists(os.path.join(folder, os.fsdecode(name))) for name in others["name"]]]
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
