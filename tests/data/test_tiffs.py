"""TIFF of any number of channels: every arrangement beside the array it was written from, and hostile directories."""

import io
import itertools
import resource
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from vitssl.data.sources import Raw
from vitssl.data.transforms import decode
from vitssl.errors import ConfigError, DataError

WHERE = "s.tar: k.tif (byte 512)"
LAST = np.random.default_rng(0).integers(0, 30, (35, 50, 6), dtype=np.uint8)  # [H, W, C]
FIRST = np.ascontiguousarray(LAST.transpose(2, 0, 1))
CONTIG = {"planarconfig": "contig", "photometric": "minisblack"}
PLANAR = {"planarconfig": "separate", "photometric": "minisblack"}


def tiff(array: np.ndarray, **options: object) -> Raw:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return Raw("k", buffer.getvalue(), None, WHERE)


ARRANGED = {
    "in one": (LAST, CONTIG),
    "in planes": (FIRST, PLANAR),
    "a page a channel": (FIRST, {"photometric": "minisblack"}),
    "a page a row, as tifffile writes it unasked": (LAST, {}),
    "ImageJ": (FIRST, {"imagej": True}),
    "OME": (FIRST, {"ome": True}),
    "BigTIFF": (LAST, CONTIG | {"bigtiff": True}),
    "big-endian": (FIRST, PLANAR | {"byteorder": ">"}),
    "tiles": (LAST, CONTIG | {"tile": (16, 32)}),
    "tiles larger than it": (FIRST, PLANAR | {"tile": (512, 512), "compression": "zlib"}),
}
KINDS = {
    "uint8": lambda values: values,
    "uint16": lambda values: values.astype(np.uint16) * 256 + 99,
    "float32": lambda values: (values / 255).astype(np.float32),
}


@pytest.mark.parametrize(("arranged", "kind"), [*itertools.product(ARRANGED, KINDS)])
def test_every_arrangement(arranged: str, kind: str) -> None:
    array, options = ARRANGED[arranged]
    found = decode(tiff(KINDS[kind](array), **options), 6, arrays=True)
    assert found.dtype == np.uint8 and found.flags.c_contiguous and np.array_equal(found, LAST)


@pytest.mark.parametrize("compression", ["lzw", "zlib", "zstd", "packbits", "lzma"])
@pytest.mark.parametrize("predictor", [False, True])
@pytest.mark.parametrize("tile", [None, (16, 16)])
def test_every_compression(compression: str, predictor: bool, tile: tuple[int, int] | None) -> None:
    for array, options in ((LAST, CONTIG), (FIRST, PLANAR)):
        for kind in KINDS.values():
            raw = tiff(kind(array), compression=compression, predictor=predictor, tile=tile, **options)
            assert np.array_equal(decode(raw, 6, arrays=True), LAST)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 10])
def test_any_number_of_channels(channels: int) -> None:
    array = np.random.default_rng(1).integers(0, 256, (20, 30, channels), dtype=np.uint8)
    for stored in (array, array.astype(np.uint16) * 256):
        raw = tiff(stored, extrasamples=("unspecified",) * (channels - 1), **CONTIG)
        assert np.array_equal(decode(raw, channels, arrays=True), array)


def pil(mode: str, **options: object) -> Raw:
    buffer = io.BytesIO()
    picture = Image.fromarray(LAST[:, :, :3] * 8).convert("RGBA").convert(mode)
    picture.save(buffer, "TIFF", **options)
    return Raw("k", buffer.getvalue(), None, WHERE)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "1", "P", "CMYK", "YCbCr", "I;16", "I"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_pictures_stay_as_they_are(mode: str, compression: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tifffile", None)  # nor is the library asked
    raw = pil(mode, compression=compression) if not mode.startswith("I") else pil(mode)
    for channels in (1, 3, 4):
        assert np.array_equal(decode(raw, channels, arrays=True), decode(raw, channels))


def test_floats_of_one_channel_lie_in_0_to_1() -> None:
    values = np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)
    assert np.array_equal(decode(tiff(values), 1, arrays=True)[:, :, 0], np.rint(values * 255))
    with pytest.raises(DataError, match=r"no stated range; store 8 or 16 bits, or set data\.arrays=true if they lie in 0\.\.1"):
        decode(tiff(values), 1)
    with pytest.raises(DataError, match=r"store 8 or 16 bits\); replace"):
        decode(tiff(values), 3)


REFUSED = {
    "a picture": (LAST[:, :, :3], {"photometric": "rgb"}, 6, r"is an array \[35, 50, 3\], and encoder.channels is 6,"),
    "a channel too many": (LAST[:, :, :4], CONTIG, 3, r"is an array \[35, 50, 4\], and encoder.channels is 3,"),
    "two for three": (LAST[:, :, :2], CONTIG, 3, r"is an array \[35, 50, 2\], and encoder.channels is 3,"),
    "a stack for one": (
        FIRST,
        {},
        1,
        r"is an array \[6, 35, 50\], and encoder.channels is 1, which asks for \[height, width\] or",
    ),
    "signed": (FIRST.astype(np.int16), {}, 6, r"holds values of type int16; store uint8"),
    "bits": (FIRST > 9, {"photometric": "minisblack"}, 6, r"does not decode \(1 bits a value; store 8, 16, 32 or 64\)"),
    "lossy": (FIRST, PLANAR | {"compression": "jpeg"}, 6, r"does not decode \(compression 7 of several channels; take one of"),
    "no range": (FIRST.astype(np.float32), {}, 6, r"holds floats from 0 to 29; only those in 0\.\.1 are read"),
    "too many pages": (np.zeros((4097, 2, 2), np.uint8), {}, 6, r"does not decode \(more than 4,096 pages\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_such_image_is_refused_in_one_line(case: str) -> None:
    array, options, channels, message = REFUSED[case]
    with pytest.raises(DataError, match=rf"^s\.tar: k\.tif \(byte 512\): {message}") as error:
        decode(tiff(array, **options), channels, arrays=True)
    assert "\n" not in str(error.value)


def test_without_the_option_it_is_named() -> None:
    with pytest.raises(DataError, match=r"is no TIFF of a plain picture; set data\.arrays=true .* if it holds other channels"):
        decode(tiff(LAST, **CONTIG), 3)


@pytest.mark.parametrize("missing", ["tifffile", "imagecodecs"])
def test_what_is_not_installed_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=rf"multi-channel TIFF with {missing}, .* pip install 'vitssl\[tiff\]'"):
        decode(tiff(LAST, **CONTIG), 6, arrays=True)


def test_sizes_are_judged_by_the_header() -> None:
    raw = tiff(FIRST.astype(np.uint16), compression="zlib")
    with pytest.raises(DataError, match=r"has more than 1,749 pixels \(data\.max_pixels\)"):
        decode(raw, 6, arrays=True, max_pixels=1749)
    with pytest.raises(DataError, match=r"unfolds to 21,000 bytes, more than 4 x data.max_pixels=5,249"):
        decode(raw, 6, arrays=True, max_pixels=5249)
    assert decode(raw, 6, arrays=True, max_pixels=5250).shape == LAST.shape


Tags = dict[int, tuple[int, int, int]]  # code -> type, count, value or offset


def strip(width: int, height: int, samples: int, size: int, **more: int) -> Tags:
    """The tags of one strip of ``size`` bytes at byte 8."""
    values = {256: width, 257: height, 258: 8, 259: more.get("compression", 8), 262: 1, 273: 8, 277: samples, 278: height,
              279: size, 284: 1}  # fmt: skip
    return {code: (4, 1, value) for code, value in values.items()}


def tiles(width: int, height: int, wide: int, high: int) -> Tags:
    kept = {code: value for code, value in strip(width, height, 6, 99).items() if code not in (273, 278, 279)}
    return kept | {322: (4, 1, wide), 323: (4, 1, high), 324: (4, 1, 8), 325: (4, 1, 99)}


def directory(tags: Tags, *, following: int = 0) -> bytes:
    rows = (struct.pack("<HHII", code, *tags[code]) for code in sorted(tags))
    return struct.pack("<H", len(tags)) + b"".join(rows) + struct.pack("<I", following)


def file(tags: Tags, body: bytes = bytes(99), *, following: int = 0) -> bytes:
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory(tags, following=following)


def endless(number: int) -> bytes:
    """Pages that all show the same strip."""
    page = strip(3, 3, 1, 9, compression=1)
    size = len(directory(page))
    return file(page, bytes(9), following=17 + size) + b"".join(
        directory(page, following=17 + size * (place + 2)) for place in range(number)
    )


BOMB = zlib.compress(bytes(400_000_000), 9)
SEGMENTS = struct.pack("<I", 500_000) * 100_000  # offset and size alike
OVERLAID = strip(9, 100_000, 6, 0) | {273: (4, 100_000, 8), 279: (4, 100_000, 8), 278: (4, 1, 1)}
OFTEN = strip(9, 9, 6, 99) | dict.fromkeys((273, 279, 324, 325, 513, 514), (4, 2_000_000, 8))
ANYTHING = r"does not decode \(.*\); replace it or take it out$"
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "a bomb that states its size": (lambda: file(strip(2**16, 2**16, 6, len(BOMB)), BOMB), r"has more than [\d,]+ pixels"),
    "a bomb that hides its size": (lambda: file(strip(9, 9, 6, len(BOMB)), BOMB), ANYTHING),
    "a million channels": (lambda: file(strip(99, 99, 10**6, 99)), r"is an array \[99, 99, 1,000,000\]"),
    "a tile of terabytes": (lambda: file(tiles(99, 99, 2**20, 2**20)), r"does not decode \(strips or tiles of 6,597,0"),
    "tiles of a pixel": (lambda: file(tiles(4000, 4000, 1, 1)), r"does not decode \(16,000,000 strips or tiles\)"),
    "tiles across": (lambda: file(tiles(1, 10**6, 10**6, 1)), r"does not decode \(strips or tiles of 6,000,000,000,000"),
    "tiles of nothing": (lambda: file(tiles(99, 99, 0, 0)), ANYTHING),
    "strips of the same bytes": (
        lambda: file(OVERLAID, SEGMENTS + bytes(2_000_000)),
        r"does not decode \(its directories name the same bytes",
    ),
    "tags of the same bytes": (lambda: file(OFTEN, bytes(8_000_000)), r"does not decode \(its directories name the same bytes"),
    "a page that follows itself": (lambda: file(strip(3, 3, 1, 9), following=107), r"does not decode \(more than 4,096 pages"),
    "pages without end": (lambda: endless(9000), r"does not decode \(more than 4,096 pages"),
    "nothing but empty directories": (lambda: b"II*\0" + struct.pack("<I", 8) + bytes(600), ANYTHING),
    "no directory": (lambda: b"II*\0\0\0\0\0", r"does not decode \(no page\)"),
    "only its magic": (lambda: b"II*\0", ANYTHING),
    "a directory beyond the file": (lambda: b"II*\0\xff\xff\xff\x7f" + bytes(99), ANYTHING),
    "sizes of nothing": (lambda: file(strip(0, 0, 6, 99)), r"is an array without pixels, \[0, 0, 6\]"),
    "cut": (lambda: tiff(LAST, **CONTIG).image[:-999], ANYTHING),
    "a depth": (lambda: file(strip(9, 9, 6, 99) | {32997: (4, 1, 2**31)}), ANYTHING),
}


@pytest.mark.filterwarnings("ignore:(Truncated|Corrupt|Metadata|Tag):UserWarning")
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_directories_are_refused_in_one_line(case: str) -> None:
    make, message = HOSTILE[case]
    raw = Raw("k", make(), None, WHERE)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(DataError, match=rf"^s\.tar: k\.tif \(byte 512\): {message}") as error:
        decode(raw, 6, arrays=True)
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 2**10 and time.monotonic() - began < 10


def test_nothing_else_is_said(tmp_path: Path) -> None:
    """Neither PIL's remarks on many channels, nor tifffile's on damage, nor numpy's on what Python 2 wrote."""
    (tmp_path / "many.tif").write_bytes(tiff(np.zeros((8, 8, 10), np.uint8), **CONTIG).image)
    (tmp_path / "odd.tif").write_bytes(file(strip(9, 9, 10, 810, compression=1) | {40000: (99, 1, 1)}, bytes(810)))
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (2L, 2L, 10L)}\n"
    (tmp_path / "old.npy").write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(40))
    program = """if True:
        import pathlib
        from vitssl.data.sources import Raw
        from vitssl.data.transforms import decode
        for path in sorted(pathlib.Path(".").iterdir()):
            print(decode(Raw("k", path.read_bytes(), None, "w"), 10, arrays=True).shape)
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("(8, 8, 10)\n(9, 9, 10)\n(2, 2, 10)\n", "")
