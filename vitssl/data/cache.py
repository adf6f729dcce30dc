"""A cache of remote bytes on a local disk: checksummed, bounded, shared by all processes of a machine.

Entries are named by the hash of their key and have a checksum, so what a crash or a bad disk left is fetched again. Writers
rename whole files into place; the least recently used go first, and an entry that is open while it goes stays readable.
"""

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_DIGEST = 16  # bytes of blake2b, at the end of an entry of bytes and beside one that is a file
_PIECE = 1 << 20
_SHRINK = 0.95  # of the limit, what a clean-up leaves
_LOOK = 0.01  # of the limit, bytes that one process writes between two looks at the whole
_LEFT = 3600.0  # seconds without a write after which a temporary file belongs to nobody


class DiskCache:
    """``limit`` in bytes, over all processes (each may exceed it by a hundredth, and what its threads write, for a moment)."""

    def __init__(self, folder: Path, *, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._written = float(limit)  # the first to write looks at what is there

    def get(self, key: str) -> bytes | None:
        """The bytes put under a key, or None where there are none, or damaged ones, which are dropped."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        body = memoryview(content)[:-_DIGEST]
        if content[-_DIGEST:] != _checksum([body]):
            path.unlink(missing_ok=True)
            return None
        with suppress(OSError):
            os.utime(path)
        return bytes(body)

    def put(self, key: str, content: bytes) -> None:
        """Keep bytes. A disk that is full or not writable keeps nothing, and nobody is stopped by it."""
        with suppress(OSError):
            self._write(self._path(key), lambda file: file.write(content + _checksum([content])))

    def file(self, key: str, fill: Callable[[BinaryIO], object]) -> str:
        """The path of a file of exactly what ``fill(file)`` wrote, filled where there is none or it is damaged.

        One process fills while others wait; until others need its room it is there, even one larger than the limit. Raises what
        ``fill`` raises, and OSError where the disk is full.
        """
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock")):
            if not _whole(path):
                digest = self._write(path, fill)
                path.with_suffix(".sum").write_bytes(digest)
            with suppress(OSError):  # others have just made room: who opens it sees that it is gone
                os.utime(path)
        return str(path)

    def _path(self, key: str) -> Path:
        name = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=20).hexdigest()
        return self.folder / name[:2] / name[2:]

    def _write(self, path: Path, fill: Callable[[BinaryIO], object]) -> bytes:
        """Fill a file under a temporary name and rename it; returns the checksum of what it holds."""
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with open(descriptor, "w+b") as file:
                fill(file)
                size = file.seek(0, os.SEEK_END)
                file.seek(0)
                digest = _checksum(iter(lambda: file.read(_PIECE), b""))
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                os.unlink(temporary)
        self._written += size
        if self._written > _LOOK * self.limit:
            self._written = 0.0
            self._shrink(str(path))
        return digest

    def _shrink(self, newest: str) -> None:
        """Drop the least recently used entries of a cache that is over its limit, but for the ``newest``, which is wanted now.

        One process at a time; others go on.
        """
        with locked(self.folder / "lock", wait=False) as mine:
            if not mine:
                return
            for folder in os.scandir(self.folder):
                drop_left_over(folder.path)
            entries = [(found.st_mtime_ns, found.st_size, path) for path, found in self._entries()]
            total = sum(size for _, size, _ in entries)
            if total <= self.limit:
                return
            for _, size, path in sorted(entry for entry in entries if entry[2] != newest):
                with suppress(OSError):
                    os.unlink(path)
                total -= size
                if total <= _SHRINK * self.limit:
                    return

    def _entries(self) -> Iterator[tuple[str, os.stat_result]]:
        for folder in os.scandir(self.folder):
            if folder.is_dir():
                for entry in os.scandir(folder.path):
                    if not entry.name.endswith((".tmp", ".lock", ".sum")):
                        with suppress(OSError):
                            yield entry.path, entry.stat()


def drop_left_over(folder: str | Path) -> None:
    """Take away what processes that were killed left half-written."""
    for path in Path(folder).glob("*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _LEFT:
                path.unlink()


def _checksum(pieces: Iterable[bytes]) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST)
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


def _whole(path: Path) -> bool:
    """Whether a file's bytes are those of the checksum beside it."""
    try:
        with open(path, "rb") as file:
            return _checksum(iter(lambda: file.read(_PIECE), b"")) == path.with_suffix(".sum").read_bytes()
    except OSError:
        return False


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file; yields whether it is held (always, where one waits)."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # else a child that was forked meanwhile would hold it, and wait for itself
