"""Reads the headers of a tar shard: which samples it holds and where their images lie. Nothing is extracted or decoded.

Samples follow the webdataset convention: members that share their path up to the first dot of the file name are one sample.
Only regular files count; links, devices, names without an extension and paths that lead out are ignored and counted.
Surprising: the standard library's reader takes damage behind the first member for the end of the archive; here it is an error.
"""

import json
import tarfile
from typing import BinaryIO, NamedTuple

from vitssl.errors import DataError

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm")
IMAGES = (
    *PICTURES,
    "npy",
)  # where a sample has several, the first is taken: an array beside a picture is what somebody computed
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BLOCK = 512


class Sample(NamedTuple):
    """One sample of a shard: key, the image member's extension, byte offset and length, and the label where there is one.

    ``labels``: all of them where it may have several, None where nothing says them.
    """

    key: str
    extension: str
    offset: int
    length: int
    label: int | None
    labels: tuple[int, ...] | None = None


def samples(path: str, *, shard: str | None = None) -> tuple[list[Sample], int]:
    """The samples of a shard in the order of their first members, and the number of members that belong to none.

    ``shard`` is its name in messages, where ``path`` is a copy of it.

    Raises DataError: missing, empty, compressed, truncated or damaged shard; a sample without an image, or with two members
    of one name; a label that is not a whole number >= 0.
    """
    shard = shard or path
    try:
        with open(path, "rb") as file:
            return _group(shard, file)
    except OSError as error:
        raise DataError(f"{shard}: cannot be read ({error.strerror or error}); check the path and its permissions") from None


def _group(shard: str, file: BinaryIO) -> tuple[list[Sample], int]:
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    ignored = 0
    for member in _members(shard, file):
        folder, slash, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        about = stem.startswith("__") and stem.endswith("__")  # webdataset's own notes, such as __index__.json
        outside = folder.startswith("/") or ".." in folder.split("/")
        if not member.isreg() or member.issparse() or not stem or not extension or about or outside:
            ignored += not member.isdir()
            continue
        group = groups.setdefault(folder + slash + stem, {})
        if extension in group:
            raise DataError(f"{shard}: two members are named {member.name!r}; write the shard again with distinct keys")
        group[extension] = member
    if not groups:
        raise DataError(f"{shard}: holds no samples; remove it from the list or write it again")
    return [_sample(shard, file, key, group) for key, group in groups.items()], ignored


def _members(shard: str, file: BinaryIO) -> "list[tarfile.TarInfo]":
    """Every member of the archive, or DataError where it does not reach its end-of-archive marker."""
    start = file.read(6)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(f"{shard}: is compressed ({name}), so no sample can be read by its offset; unpack it to .tar")
    file.seek(0)
    if not start:
        raise DataError(f"{shard}: is an empty file; fetch it again or remove it from the list")
    members, offset = [], 0
    try:
        with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                if tar.offset <= offset or member.size < 0:
                    raise tarfile.ReadError("a member of negative size")
                offset = tar.offset
                members.append(member)
    except (tarfile.TarError, ValueError, OverflowError, LookupError) as error:
        raise _damaged(shard, file, members, offset, str(error)) from None
    _check_end(shard, file, members, offset)
    return members


def _check_end(shard: str, file: BinaryIO, members: "list[tarfile.TarInfo]", offset: int) -> None:
    """The standard library stops quietly at whatever is not a header: only a block of zeros is the end."""
    file.seek(offset)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        raise _damaged(shard, file, members, offset, "no end-of-archive marker")
    if any(block):
        raise _damaged(shard, file, members, offset, "bytes that are no tar header")
    while rest := file.read(1 << 20):
        if rest.strip(b"\0"):
            raise DataError(
                f"{shard}: more data follows the end-of-archive marker at byte {offset:,}, so samples would be lost; "
                "join archives with tar --concatenate, or list them one by one"
            )


def _damaged(shard: str, file: BinaryIO, members: "list[tarfile.TarInfo]", offset: int, reason: str) -> DataError:
    size = file.seek(0, 2)
    last = "at its first member"
    if members:
        last = f"{'after' if offset <= size else 'inside'} member {members[-1].name!r}"
    place = f"byte {min(offset, size):,} of {size:,}: {reason}"
    return DataError(f"{shard}: is truncated or damaged {last} ({place}); fetch it again or remove it from the list")


def _sample(shard: str, file: BinaryIO, key: str, group: "dict[str, tarfile.TarInfo]") -> Sample:
    lower = {extension.lower(): extension for extension in group}
    image = next((lower[extension] for extension in IMAGES if extension in lower), None)
    if image is None:
        found = ", ".join(f".{extension}" for extension in group)
        kinds = ", ".join(f".{kind}" for kind in IMAGES)
        raise DataError(f"{shard}: sample {key!r} has no image, only {found}; images end in {kinds}: write the shard again")
    label, labels = None, None
    if "cls" in lower:
        labels = _labels(shard, group[lower["cls"]], _bytes(file, group[lower["cls"]]))
        label = labels[0] if len(labels) == 1 else None
    elif "json" in lower:
        label, labels = _labels_in_json(shard, group[lower["json"]], _bytes(file, group[lower["json"]]))
    return Sample(key, image, group[image].offset_data, group[image].size, label, labels)


def _bytes(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)


def _labels(shard: str, member: tarfile.TarInfo, content: bytes) -> tuple[int, ...]:
    """The numbers of a .cls, of which there is at least one; between several stand spaces or commas."""
    words = content.replace(b",", b" ").split()
    if not words or not all(word.isdigit() and len(word) <= 18 for word in words):
        raise DataError(f"{shard}: label {member.name!r} is {content[:20]!r}, not a whole number from 0; write the shard again")
    return tuple(map(int, words))


def _labels_in_json(shard: str, member: tarfile.TarInfo, content: bytes) -> tuple[int | None, tuple[int, ...] | None]:
    """The ``label`` or ``cls`` of a JSON object, None where it has no such key or the value is no number; and its ``labels``,
    of which one that is no list of whole numbers from 0 says nothing."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        raise DataError(f"{shard}: {member.name!r} is not valid JSON; write the shard again") from None
    values = values if isinstance(values, dict) else {}
    label, several = values.get("label", values.get("cls")), values.get("labels")
    if isinstance(label, bool) or not isinstance(label, int):
        label = None
    else:
        (label,) = _labels(shard, member, str(label).encode())
    if isinstance(several, list) and all(type(each) is int and 0 <= each < 10**18 for each in several):
        return label, tuple(several)
    return label, None if label is None or several is not None else (label,)
