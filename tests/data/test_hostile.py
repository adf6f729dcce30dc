"""Hostile shards, followed to the end: opened, indexed, read, decoded. Nothing runs, nothing is written, nothing grows, and
what is good in them is used. Damage without malice is in test_index and test_fuzz; hostile servers are in stores/test_http."""

import io
import os
import pickle
import resource
import struct
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from vitssl.data.loader import batches
from vitssl.data.order import Order
from vitssl.data.samples import Samples
from vitssl.data.sources import open_source
from vitssl.errors import DataError
from vitssl.views import View

GOOD = 6  # images beside the hostile one


class Trap:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def png(width: int, height: int, data: bytes) -> bytes:
    """A PNG of these stated sizes with this compressed body."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def sparse() -> tuple[tarfile.TarInfo, bytes]:
    """A member that says it unfolds to a terabyte."""
    info, content = member("0000.png", b"x" * 512)
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**40)}
    return info, content


BOMB = zlib.compress(bytes(50_000_000), 9)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(%pipe%touch trap) (w) file\nshowpage\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'

# What the hostile sample is, and what becomes of it: "ignored" members are counted, "bad" images are replaced, "refused" shards
# stop the start with one line, "labels" are of no use and everything else is.
CASES: dict[str, tuple[Callable[[Path], list[tuple[tarfile.TarInfo, bytes]]], str]] = {
    "an absolute path": (lambda trap: [member(f"{trap}/0000.png", b"x")], "ignored"),
    "a path that leads out": (lambda trap: [member("../../trap/0000.png", b"x")], "ignored"),
    "a path that leads out inside": (lambda trap: [member("a/../../0000.png", b"x")], "ignored"),
    "a symbolic link": (lambda trap: [member("0000.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")], "ignored"),
    "a hard link": (lambda trap: [member("0000.png", type=tarfile.LNKTYPE, linkname="/etc/passwd")], "ignored"),
    "a device": (lambda trap: [member("0000.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5)], "ignored"),
    "a pipe": (lambda trap: [member("0000.png", type=tarfile.FIFOTYPE)], "ignored"),
    "a sparse file": (lambda trap: [sparse()], "refused"),
    "no extension": (lambda trap: [member("0000", b"x")], "ignored"),
    "a hidden name": (lambda trap: [member(".png", b"x")], "ignored"),
    "a pickle as its image": (lambda trap: [member("0000.pkl", pickle.dumps(Trap(trap))), member("0000.png", b"")], "bad"),
    "only a pickle": (lambda trap: [member("0000.pkl", pickle.dumps(Trap(trap)))], "refused"),
    "a pickle named png": (lambda trap: [member("0000.png", pickle.dumps(Trap(trap)))], "bad"),
    "torch's own format named jpg": (lambda trap: [member("0000.jpg", b"PK\x03\x04" + pickle.dumps(Trap(trap)))], "bad"),
    "a script named jpg": (lambda trap: [member("0000.jpg", f"#!/bin/sh\nmkdir {trap}\n".encode())], "bad"),
    "PostScript named png": (lambda trap: [member("0000.png", EPS)], "bad"),
    "SVG named png": (lambda trap: [member("0000.png", SVG)], "bad"),
    "zero bytes": (lambda trap: [member("0000.png", b"")], "bad"),
    "a bomb that states its size": (lambda trap: [member("0000.png", png(100_000, 100_000, BOMB))], "bad"),
    "a bomb that hides its size": (lambda trap: [member("0000.png", png(4, 4, BOMB))], "either"),
    "sizes of nothing": (lambda trap: [member("0000.png", png(0, 0, b""))], "bad"),
    "sizes beyond 31 bits": (lambda trap: [member("0000.png", png(2**31 + 5, 2**31 + 5, b""))], "bad"),
    "a TIFF of endless directories": (lambda trap: [member("0000.tif", b"II*\0\x08\0\0\0" + b"\0\0\x08\0\0\0" * 50)], "bad"),
    "deep JSON": (lambda trap: [member("0000.png", b""), member("0000.json", b"[" * 200_000)], "refused"),
    "a label of a million digits": (lambda trap: [member("0000.png", b""), member("0000.cls", b"9" * 10**6)], "refused"),
    "a name of control characters": (lambda trap: [member("00\x1b[2J\n00.png", b"x")], "bad"),
    "a name of 3000 letters": (lambda trap: [member("a" * 3000 + ".png", b"x")], "bad"),
    "a name that is no text": (lambda trap: [member("\udcff\udcfe.png", b"x")], "bad"),
    "a size beyond the file": (lambda trap: [member("0000.png", b"x")], "refused"),
    "ten thousand empty folders": (lambda trap: [member(f"d{n}", type=tarfile.DIRTYPE) for n in range(10_000)], "fine"),
}


@pytest.fixture
def shard(tmp_path: Path, encoded: Callable) -> Callable[..., Path]:
    """``shard(members)``: a tar of these and of six good images behind them."""

    def write(members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
        (tmp_path / "data").mkdir()
        with tarfile.open(tmp_path / "data/s.tar", "w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as tar:
            for info, content in [*members, *(member(f"good{number}.png", encoded(number)) for number in range(GOOD))]:
                tar.addfile(info, io.BytesIO(content))
        return tmp_path / "data/s.tar"

    return write


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_a_hostile_shard(shard: Callable, tmp_path: Path, case: str, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    make, outcome = CASES[case]
    monkeypatch.chdir(tmp_path)
    path = shard(make(tmp_path / "trap"))
    if "beyond the file" in case:
        data = bytearray(path.read_bytes())
        data[124:136] = b"77777777777\0"  # the size of the first member: 8 GiB
        data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:512]))
        path.write_bytes(bytes(data))
    before, began, outside = memory(), time.monotonic(), files(tmp_path)
    if outcome == "refused":
        with pytest.raises(DataError) as error:
            open_source(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    else:
        source = open_source(path)
        num = GOOD + (outcome in ("bad", "either"))
        assert source.num_samples == num and source.ignored == (1 if outcome == "ignored" else 0)
        samples = Samples(source, Order(source.chunks, seed=0), [View((8, 8))], seed=0, substitute=True)
        (batch,) = batches(samples, start=0, stop=num, batch_size=num, micro_batch=num, workers=workers)
        assert len(batch) == num and len(batch.bad) in {"bad": [1], "either": [0, 1]}.get(outcome, [0])
        assert all("\n" not in each.reason and "\x1b" not in each.reason for each in batch.bad)
    assert not (tmp_path / "trap").exists() and not (tmp_path.parent / "trap").exists()
    assert files(tmp_path) - outside <= {"data/s.tar.index", "data/vitssl.manifest"}
    assert time.monotonic() - began < 20 and memory() - before < 300 * 2**20


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def memory() -> int:
    """Bytes this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
