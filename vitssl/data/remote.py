"""What is asked of a shard that lies elsewhere: its size, its ends, small files beside it, and a copy of it for a while."""

import functools
import hashlib
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from vitssl.data.cache import DiskCache, drop_left_over
from vitssl.data.stores import Access, NoRanges, Passing, Stat, Unreachable, is_url, open_store, shown, unsigned
from vitssl.errors import DataError

_whole: dict[str, str] = {}  # shards that can only be had whole, and where their copies are
_identities: dict[str, str] = {}  # of those copies
ENDS = 64 << 10  # bytes at each end of a file that go into its identity
_TRIES = 5  # to open a file that is fetched
_SMALL = 256 << 20  # bytes of an index or a manifest: of more than that nothing good is to be expected


def user_cache() -> Path:
    """``$VITSSL_CACHE``, or ``~/.cache/vitssl``."""
    return Path(os.environ.get("VITSSL_CACHE") or "~/.cache/vitssl").expanduser()


def disk_cache(access: Access) -> DiskCache:
    """The cache the user named, or the user's own; one a process, since it counts what it writes."""
    return _disk_cache(access.cache or user_cache() / "files", access.cache_bytes)


@functools.cache
def _disk_cache(folder: Path, limit: int) -> DiskCache:
    return DiskCache(folder, limit=limit)


def stat(shard: str, access: Access) -> Stat:
    """Size, tag and whether ranges can be read. Raises DataError, Unreachable."""
    found = open_store(shard, access).stat(shard)
    return found if found.size >= 0 else found._replace(size=os.path.getsize(_kept(shard, access)))


def ends(shard: str, length: int, access: Access) -> tuple[int, bytes, bytes]:
    """(size, first bytes, last bytes) of a remote shard, as reading a local one gives them."""
    found = stat(shard, access)
    last = max(0, found.size - length)
    if found.ranges:
        store = open_store(shard, access)
        return found.size, store.read(shard, 0, min(length, found.size)), store.read(shard, last, found.size - last)
    with _opened(shard, access) as file:
        first = file.read(min(length, found.size))
        file.seek(last)
        return found.size, first, file.read(found.size - last)


def read(shard: str, offset: int, length: int, size: int | None, access: Access, *, identity: str) -> bytes:
    """A range of a remote shard of this size and identity, through the cache the user named. Raises DataError, Unreachable."""
    cache, key = disk_cache(access), f"{unsigned(shard)} {identity} {offset} {length}"
    try:
        if shard in _whole:
            raise NoRanges(shard)
        content = cache.get(key) if access.cache else None
        if content is None:
            content = open_store(shard, access).read(shard, offset, length, size=size)
            if access.cache:
                cache.put(key, content)
    except NoRanges:
        with _opened(shard, access) as file:
            if (now := _checked(shard, identity, file)) != identity:
                said = f"{shown(shard)}: changed since it was indexed ({now.partition('-')[0]} bytes now); index it again"
                raise Passing(said) from None
            content = os.pread(file.fileno(), length, offset)
    return content


@contextmanager
def copy_of(shard: str, access: Access) -> Iterator[str]:
    """The path of a local shard, or of a copy of a remote one that lasts as long as this does."""
    if not is_url(shard):
        yield shard
        return
    found = stat(shard, access)
    if not found.ranges:
        _forget(shard)  # who indexes it wants what is there now
        yield _kept(shard, access)
        return
    folder = user_cache() / "index"
    folder.mkdir(parents=True, exist_ok=True)
    drop_left_over(folder)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp") as file:
        open_store(shard, access).fetch(shard, file, size=found.size)
        file.flush()
        yield file.name


def small_file(url: str, access: Access) -> bytes | None:
    """All of a file that may not be there, such as an index. Raises Unreachable."""
    store = open_store(url, access)
    try:
        content = _Bounded(store.stat(url).size)
        store.fetch(url, content)
    except Unreachable:
        raise
    except DataError:  # there is none, or none that can be one
        return None
    return content.getvalue()


class _Bounded(io.BytesIO):
    """Takes as many bytes as were promised, and no more than a small file may have."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        if not 0 <= most <= _SMALL:
            raise DataError("is no small file")

    def write(self, content: bytes) -> int:
        if self.tell() + len(content) > self.most:
            raise DataError("is longer than it was said to be")
        return super().write(content)


def identity_of_file(file: BinaryIO) -> str:
    """Size and hash of both ends of a local file: what tells whether it is still the same."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    ends = file.read(ENDS)
    file.seek(max(0, size - ENDS))
    return identity(size, ends, file.read(ENDS))


def identity(size: int, first: bytes, last: bytes) -> str:
    """Of a file's ends, which may overlap."""
    return f"{size}-{hashlib.blake2b(first + last, digest_size=16).hexdigest()}"


def _forget(shard: str) -> None:
    _whole.pop(shard, None)
    _identities.pop(shard, None)


def _checked(shard: str, wanted: str, file: BinaryIO) -> str:
    """The identity of a whole copy, looked at once a process."""
    if shard not in _identities:
        _identities[shard] = identity_of_file(file) if "-" in wanted else wanted
    return _identities[shard]


def _opened(shard: str, access: Access) -> BinaryIO:
    """The whole copy of a shard, which others may drop between filling and opening it."""
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):
            return open(_kept(shard, access), "rb")
    raise Unreachable(f"{shown(shard)}: its copy is dropped before it is read; give data.cache_size room for several shards")


def _kept(shard: str, access: Access) -> str:
    """A whole copy in the cache, of a shard that cannot be read in parts; its checksum is looked at once a process."""
    if not os.path.exists(_whole.get(shard, "")):
        store = open_store(shard, access)
        found = store.stat(shard)
        key = f"{unsigned(shard)} {found.size} {found.tag} whole"
        size = found.size if found.size >= 0 else None
        _forget(shard)
        _whole[shard] = disk_cache(access).file(key, lambda file: store.fetch(shard, file, size=size))
    return _whole[shard]
