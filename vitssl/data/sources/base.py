"""The one contract of every source: samples numbered from 0, cut into chunks, and ``read(ids)``, which gives the bytes.

In what order they are read is not a source's business (:mod:`vitssl.data.order`). Sources are small pickles and open files
lazily, so a worker process is handed one as it is.
"""

import hashlib
import os
import stat
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from vitssl.errors import DataError

MAX_BYTES = 256 << 20  # of one encoded image: of a larger member nothing good is to be expected
DEFAULT_MEMORY = 1 << 30  # bytes of chunks that a process may hold, where nobody said how many


UNREAD = "unread"
"""Stands in a fingerprint for the hash of bytes that nobody has read yet."""


class Raw(NamedTuple):
    """One sample as it is stored: the encoded image, its label where it has one, and ``where`` it lies, for messages.

    ``key`` is its name within the source, such as ``train-003.tar/0027``: what a ledger writes down. Bytes that could not be
    had are empty, and ``problem`` says why; ``passing`` problems are the network's or the moment's.
    """

    key: str
    image: bytes
    label: int | tuple[int, ...] | None  # a tuple where a sample may have several
    where: str
    problem: str = ""
    passing: bool = False


class Ahead(NamedTuple):
    """What a reader will be asked for soon (ids, soonest first), and the bytes it may hold for that in this process."""

    ids: NDArray[np.int64]
    memory: int


def fingerprint(parts: Iterable[str | bytes]) -> str:
    """A hash of what tells a source's samples apart, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update((part if isinstance(part, bytes) else part.encode("utf-8", "surrogateescape")) + b"\0")
    return digest.hexdigest()


def refuse_stray(name: str, labels: NDArray[np.int64]) -> None:
    """Raise DataError where numbers are no classes counted from 0: a head would have an output for each up to the largest."""
    different, largest = len(np.unique(labels)), int(labels.max())
    if largest >= max(1000, 10 * different):
        raise DataError(f"{name}: has {different:,} different labels, and one is {largest:,}; number classes from 0 on")


def stamp(source: "Source") -> str:
    """Sizes and times of change of the files behind a source: beside its fingerprint, which of files knows only names, this
    tells whether what was computed of its samples and kept is of the bytes that are there now."""
    own = [source.stamp()] if hasattr(source, "stamp") else []
    inner = [source.source] if hasattr(source, "source") else getattr(source, "parts", [])
    return fingerprint([*own, *map(stamp, inner)])


def file_stamp(paths: Iterable[str]) -> bytes:
    """Sizes and times of change of files, in order; of one that is not there it says so."""

    def of(path: str) -> tuple[int, int]:
        try:
            found = os.stat(path)
        except OSError:
            return -1, -1
        return found.st_size, found.st_mtime_ns

    return np.array([of(path) for path in paths], dtype=np.int64).tobytes()


def same_samples(then: str, now: str) -> bool:
    """Whether two fingerprints are of the same samples; of shards that one of them only counted, by names and counts."""
    parts = list(zip(then.split("+"), now.split("+"), strict=False))

    def same(one: str, other: str) -> bool:
        (content, _, counts), (content_now, _, counts_now) = one.partition("."), other.partition(".")
        return counts == counts_now if UNREAD in (content, content_now) else content == content_now

    return then.count("+") == now.count("+") and all(same(*part) for part in parts)


def printable(name: str) -> str:
    """A name for people and terminals: what is no character to be seen is written as its escape."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in name)


def too_large(where: str, size: int) -> str:
    """The problem of an encoded image of ``size`` bytes; empty where it is none."""
    return f"{where}: has {size:,} bytes, more than {MAX_BYTES:,}; take it out" if size > MAX_BYTES else ""


def read_file(path: str | os.PathLike, *, key: str, label: int | None) -> Raw:
    """The sample that is a file of its own, or its problem."""
    where = printable(os.fspath(path))
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or a device might never end
            return Raw(key, b"", label, where, f"{where}: is no file; take it out")
        with open(path, "rb") as file:
            if problem := too_large(where, os.fstat(file.fileno()).st_size):
                return Raw(key, b"", label, where, problem)
            return Raw(key=key, image=file.read(), label=label, where=where)
    except OSError as error:
        problem = f"{where}: cannot be read ({error.strerror or error}); put it back and start again"
        return Raw(key, b"", label, where, problem, passing=True)
    except ValueError as error:  # no name that a file could have
        return Raw(key, b"", label, where, f"{where}: cannot be read ({error}); take it out")


def one_by_one(num_samples: int) -> NDArray[np.int64]:
    """Chunks of samples that are read one by one, so that keeping neighbours together gains nothing: up to two million."""
    size = -(-num_samples // 2_000_000)
    return np.diff(np.append(np.arange(0, num_samples, size), num_samples))


def cut(counts: NDArray, size: int) -> NDArray[np.int64]:
    """Chunks of ``size`` samples of each of the parts with ``counts`` samples, the rest spread so that none is a crumb."""
    pieces = -(-counts // size)  # per part
    part = np.repeat(np.arange(len(counts)), pieces)
    place = np.arange(len(part)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return counts[part] * (place + 1) // pieces[part] - counts[part] * place // pieces[part]


class Source(Protocol):
    """Images somewhere. ``chunks`` [C] int64 counts the samples of each chunk: chunk c holds ``counts[c]`` consecutive ids."""

    name: str
    num_samples: int
    chunks: NDArray[np.int64]
    labels: bool  # whether every sample has a label
    classes: tuple[str, ...] | None  # names of the labels, where they have any
    ignored: int  # files or members that are no part of any sample
    fingerprint: str  # of the samples under their ids, wherever they lie: what :func:`same_samples` compares
    by_chunk: bool  # one sample costs as much as its chunk: to be asked for close together, in one process, and ahead of need
    mean_bytes: int  # of a sample as it is stored; 0 where that is not known

    def read(self, ids: Sequence[int], ahead: Ahead | None = None) -> list[Raw]:
        """The samples of these ids, in this order, each with its bytes or its problem."""
        ...

    def label_array(self) -> NDArray[np.int64] | None:
        """[N] labels of all samples without reading an image, or None unless every sample has one."""
        ...
