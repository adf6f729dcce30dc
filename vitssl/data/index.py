"""The sidecar index of a tar shard: where each sample's image lies, so that one ``pread`` fetches it.

A sidecar is one JSON line (format, identity of the shard, counts) followed by fixed-width records that are memory-mapped, so
opening it costs nothing, its pages are shared by all workers, and nothing is unpickled. It lies next to its shard or, where
that is not writable or far away, in ``$VITSSL_CACHE`` (default ``~/.cache/vitssl``), and is rebuilt when the shard's size or
the hash of its first and last 64 KiB differs. Surprising: a shard without its end-of-archive marker is refused, because an
archive cut exactly between two members looks just like that and would lose samples without a word.
"""

import errno
import hashlib
import json
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vitssl.data import remote, tarscan
from vitssl.data.cache import locked
from vitssl.data.stores import USUAL, Access, Unreachable, beside, is_url, shown, unsigned
from vitssl.errors import DataError

VERSION = 1
SUFFIX = ".index"  # of a sidecar, after the name of its shard
NO_LABEL = np.iinfo(np.int64).min


@dataclass
class ShardIndex:
    """The index of one shard. Picklable in a few bytes: the records are mapped again from the sidecar where they are used."""

    shard: str
    identity: str  # size and hash of the ends
    num_samples: int
    num_unlabelled: int
    ignored: int  # members that belong to no sample: links, devices, names without an extension
    key_bytes: int
    sidecar: str | None = None  # None where no sidecar could be written: the records then travel with the pickle
    _records: np.ndarray | None = field(default=None, repr=False)

    @property
    def records(self) -> np.ndarray:
        """[num_samples] records of :func:`record_type`; DataError where the sidecar was replaced by that of another shard."""
        if self._records is None:
            found = _read(Path(self.sidecar), shard=self.shard)
            if found is None or found.identity != self.identity:
                raise DataError(f"{self.sidecar}: the index changed while in use; leave the shards alone and start again")
            self._records = found._records
        return self._records

    def __getstate__(self) -> dict:
        return self.__dict__ | ({"_records": None} if self.sidecar else {})


def record_type(key_bytes: int) -> np.dtype:
    """One sample: its key (UTF-8), the image's byte offset and length in the shard, the label, the image's extension."""
    fields = [("key", f"S{key_bytes}"), ("offset", "<i8"), ("length", "<i8"), ("label", "<i8"), ("extension", "S5")]
    return np.dtype(fields)


def load_index(shard: str, *, identity: str | None = None, access: Access = USUAL) -> ShardIndex | None:
    """The index in the shard's sidecar, or None where there is none of this ``identity`` (default: that of its bytes)."""
    sidecars = [path for path in _sidecars(shard) if path.exists()]
    if not is_url(shard) and (not sidecars or (identity is None and not os.path.exists(shard))):
        return None
    identity = identity or identity_of(shard, access)
    for path in sidecars:
        index = _read(path, shard=shard)
        if index is not None and index.identity == identity:
            return index
    return _from_afar(shard, identity, access) if is_url(shard) else None


def build_index(shard: str, access: Access = USUAL) -> ShardIndex:
    """Scan a shard and write its sidecar. Raises DataError naming the shard, what is wrong with it and what to do."""
    with remote.copy_of(shard, access) as path:
        samples, ignored = tarscan.samples(path, shard=shown(shard))
        identity = identity_of(path, access)
    keys = [sample.key.encode("utf-8", "surrogateescape") for sample in samples]
    records = np.zeros(len(samples), record_type(max(map(len, keys))))
    records["key"] = keys
    records["offset"] = [sample.offset for sample in samples]
    records["length"] = [sample.length for sample in samples]
    records["label"] = [NO_LABEL if sample.label is None else sample.label for sample in samples]
    records["extension"] = [sample.extension.encode() for sample in samples]
    index = ShardIndex(
        shard=shard,
        identity=identity,
        num_samples=len(samples),
        num_unlabelled=int((records["label"] == NO_LABEL).sum()),
        ignored=ignored,
        key_bytes=records.dtype["key"].itemsize,
        _records=records,
    )
    for path in _sidecars(shard):
        try:
            _write(index, path)
        except OSError:
            continue  # not writable, or full: the next place
        index.sidecar = str(path)
        break
    return index


def index_once(shard: str, access: Access) -> ShardIndex:
    """The index of a remote shard, which is fetched for that by one process of this machine while others wait."""
    lock = cached(shard, ".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock):
        return load_index(shard, access=access) or build_index(shard, access)


def _sidecars(shard: str) -> tuple[Path, ...]:
    """Where a shard's sidecar may lie, in order of preference."""
    return (cached(shard, SUFFIX),) if is_url(shard) else (Path(f"{shard}{SUFFIX}"), cached(shard, SUFFIX))


def _from_afar(shard: str, identity: str, access: Access) -> ShardIndex | None:
    """The sidecar that lies beside a remote shard, copied into the cache; None where there is none of this shard."""
    content = remote.small_file(beside(shard, SUFFIX), access)
    if content is None:
        return None
    path = cached(shard, SUFFIX)
    replace_file(path, content)
    index = _read(path, shard=shard)
    if index is not None and index.identity == identity and index.num_samples:
        size = int(identity.partition("-")[0])
        offsets, lengths = index.records["offset"], index.records["length"]
        inside = offsets.min() >= 0 and lengths.min() >= 0 and offsets.max() <= size and (lengths <= size - offsets).all()
        known = {extension.decode("ascii", "replace") for extension in np.unique(index.records["extension"])}
        unlabelled = int((index.records["label"] == NO_LABEL).sum())
        if inside and unlabelled == index.num_unlabelled and known <= set(tarscan.IMAGES):
            return index
    path.unlink(missing_ok=True)
    return None


def cached(path: str, suffix: str) -> Path:
    """Where the cache keeps what belongs to a path or url."""
    name = (unsigned(path) if is_url(path) else os.path.abspath(path)).encode("utf-8", "surrogateescape")
    return remote.user_cache() / "index" / f"{hashlib.blake2b(name, digest_size=16).hexdigest()}{suffix}"


def replace_file(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename: a reader sees a whole file or none. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def identity_of(shard: str, access: Access) -> str:
    """Size and hash of both ends of a file: what tells whether it is still the same."""
    if is_url(shard):
        return remote.identity(*remote.ends(shard, remote.ENDS, access))
    with open(shard, "rb") as file:
        return remote.identity_of_file(file)


def _write(index: ShardIndex, path: Path) -> None:
    head = {"format": "vitssl-index", "version": VERSION}
    head |= {key: value for key, value in vars(index).items() if key not in ("shard", "sidecar", "_records")}
    replace_file(path, json.dumps(head).encode() + b"\n" + index.records.tobytes())


def _read(path: Path, *, shard: str) -> ShardIndex | None:
    """The index a sidecar holds, or None where it is missing, of another version or damaged."""
    try:
        with open(path, "rb") as file:
            line = file.readline(4096)
            head = json.loads(line)
            if head.pop("format", None) != "vitssl-index" or head.pop("version", None) != VERSION:
                return None
            index = ShardIndex(shard=shard, sidecar=str(path), **head)
            counts = (index.num_samples, index.num_unlabelled, index.ignored, index.key_bytes)
            if not all(type(count) is int and 0 <= count < 1 << 40 for count in counts) or not isinstance(index.identity, str):
                return None
            dtype = record_type(index.key_bytes)
            if os.fstat(file.fileno()).st_size != len(line) + index.num_samples * dtype.itemsize:
                return None
        records = np.memmap(path, dtype=dtype, mode="r", offset=len(line), shape=(index.num_samples,))
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO):
            raise Unreachable(f"{path}: cannot be read ({error.strerror}); look at the disk and at ulimit -n") from None
        return None
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return None
    index._records = records.view(np.ndarray)
    return index
