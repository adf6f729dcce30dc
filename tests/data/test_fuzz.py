"""Whatever bytes come: a sample, or one DataError. No other exception, no hang, no file beside the shard but its index."""

import io
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from vitssl.data import tarscan
from vitssl.data.sources import Raw
from vitssl.data.transforms import decode
from vitssl.errors import DataError

SECONDS = 20.0  # far more than the work takes; a hang is what this finds


def mutated(content: bytes, chance: np.random.Generator) -> bytes:
    """One of: flipped bits, a block overwritten, cut, a piece removed, a piece doubled."""
    data = bytearray(content)
    kind, at = chance.integers(5), int(chance.integers(len(data)))
    if kind == 0:
        for place in chance.integers(0, len(data), 1 + int(chance.integers(8))):
            data[place] ^= 1 << int(chance.integers(8))
    elif kind == 1:
        data[at : at + 64] = chance.bytes(min(64, len(data) - at))
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        del data[at : at + int(chance.integers(1, 600))]
    else:
        data[at:at] = data[at : at + int(chance.integers(1, 600))]
    return bytes(data)


def encoded(format: str, mode: str) -> bytes:
    coarse = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((40, 30), Image.Resampling.BICUBIC).convert(mode).save(buffer, format=format)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("format", "mode"),
    [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P"), ("WEBP", "RGB"), ("GIF", "P"), ("TIFF", "RGB")],
)
def test_mutated_images_decode_or_are_named(format: str, mode: str) -> None:
    chance, good, began, outcomes = np.random.default_rng(1), encoded(format, mode), time.monotonic(), [0, 0]
    for _ in range(2000):
        raw = Raw(key="k", image=mutated(good, chance), label=None, where="s.tar: k (byte 512)")
        try:
            pixels = decode(raw)
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
            outcomes[0] += 1
        except DataError as error:
            assert str(error).startswith("s.tar: k (byte 512): ") and "\n" not in str(error)
            outcomes[1] += 1
    assert min(outcomes) > 0 and time.monotonic() - began < SECONDS


def arrayed(kind: str) -> bytes:
    """Six channels of 30 x 40."""
    values, buffer = np.random.default_rng(0).integers(0, 9, (30, 40, 6), dtype=np.uint8), io.BytesIO()
    if kind == "npy":
        np.save(buffer, values)
    elif kind == "pages":
        tifffile.imwrite(buffer, values.transpose(2, 0, 1), photometric="minisblack", compression="zlib")
    else:
        options = {"tile": (16, 16)} if kind == "tiles" else {}
        tifffile.imwrite(buffer, values, planarconfig="contig", photometric="minisblack", compression="lzw", **options)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["npy", "pages", "tiles", "strips"])
def test_mutated_arrays_decode_or_are_named(kind: str) -> None:
    chance, good, began, outcomes = np.random.default_rng(1), arrayed(kind), time.monotonic(), [0, 0]
    for number in range(2000):
        content = bytearray(mutated(good, chance))
        for place in chance.integers(0, min(len(content), 500), number % 4) if content else ():  # where the headers are
            content[place] = chance.choice([0, 255, chance.integers(256)])
        raw = Raw(key="k", image=bytes(content), label=None, where="s.tar: k (byte 512)")
        try:
            pixels = decode(raw, 6, arrays=True)
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 6
            outcomes[0] += 1
        except DataError as error:
            assert str(error).startswith("s.tar: k (byte 512): ") and "\n" not in str(error)
            outcomes[1] += 1
    assert min(outcomes) > 0 and time.monotonic() - began < SECONDS


def test_mutated_tars_are_read_or_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(6):
            for extension, content in (("jpg", bytes([number]) * 700), ("cls", b"1"), ("json", b'{"label": 2}')):
                info = tarfile.TarInfo(f"{'d/' * (number % 3)}{'k' * (40 * number)}{number}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    chance, began, outcomes, shard = np.random.default_rng(2), time.monotonic(), [0, 0], tmp_path / "s.tar"
    for _ in range(3000):
        shard.write_bytes(mutated(buffer.getvalue(), chance))
        try:
            samples, _ = tarscan.samples(str(shard))
            size = shard.stat().st_size
            assert samples and all(0 <= sample.offset <= sample.offset + sample.length <= size for sample in samples)
            outcomes[0] += 1
        except DataError as error:
            assert str(error).startswith(str(shard)) and "\n" not in str(error)
            outcomes[1] += 1
    assert min(outcomes) > 0 and time.monotonic() - began < SECONDS
    assert [path.name for path in tmp_path.iterdir()] == ["s.tar"]


def test_paths_that_lead_out_are_ignored_and_counted(tmp_path: Path, write_tar: Callable) -> None:
    names = ["/etc/a.jpg", "../b.jpg", "x/../../c.jpg", "x/d.jpg"]
    found, ignored = tarscan.samples(write_tar(tmp_path / "s.tar", dict.fromkeys(names, b"x")))
    assert [sample.key for sample in found] == ["x/d"] and ignored == 3
