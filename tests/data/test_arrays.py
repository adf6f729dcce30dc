"""Arrays of any number of channels: every type and layout beside a slow reading, and what is refused, in one line."""

import io
import itertools
import os
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitssl.data import transforms
from vitssl.data.sources import Raw
from vitssl.data.transforms import decode, show
from vitssl.errors import ConfigError, DataError
from vitssl.views import View

WHERE = "s.tar: k.npy (byte 512)"
CHANCE = np.random.default_rng(0)
BYTES = CHANCE.integers(0, 256, (5, 7, 6), dtype=np.uint8)  # [H, W, C]
VALUES = {  # type -> values [5, 7, 6]
    "|u1": BYTES,
    "<u2": CHANCE.integers(0, 2**16, BYTES.shape, dtype=np.uint16),
    "|b1": BYTES > 99,
    "<f2": BYTES / 255,
    "<f4": CHANCE.random(BYTES.shape),
    "<f8": CHANCE.random(BYTES.shape),
}
VALUES |= {f">{kind[1:]}": values for kind, values in VALUES.items() if kind[0] == "<"}
LAYOUTS = {"channels last": lambda a: a, "channels first": lambda a: np.moveaxis(a, 2, 0)}


def npy(array: np.ndarray) -> Raw:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return Raw("k", buffer.getvalue(), None, WHERE)


def slow(values: np.ndarray) -> np.ndarray:
    """Value by value, in Python's own numbers."""
    found = np.zeros(values.shape, dtype=np.uint8)
    for place in np.ndindex(values.shape):
        value = values[place]
        if values.dtype.kind == "f":
            found[place] = round(255 * float(value))
        else:
            found[place] = 255 * int(value) if values.dtype.kind == "b" else int(value) >> (8 * values.dtype.itemsize - 8)
    return found


@pytest.mark.parametrize(("kind", "layout", "by_columns"), [*itertools.product(VALUES, LAYOUTS, [False, True])])
def test_every_type_and_layout_beside_a_slow_reading(kind: str, layout: str, by_columns: bool) -> None:
    values = VALUES[kind].astype(kind)
    stored = LAYOUTS[layout](values)
    raw = npy(np.asfortranarray(stored) if by_columns else np.ascontiguousarray(stored))
    assert (b"'fortran_order': True" in raw.image) == by_columns
    found = decode(raw, 6, arrays=True)
    assert found.dtype == np.uint8 and found.flags.c_contiguous and found.flags.writeable
    assert np.array_equal(found, slow(values))


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (1, 5, 7)])
def test_one_channel_needs_no_axis(shape: tuple[int, ...]) -> None:
    assert np.array_equal(decode(npy(BYTES[:, :, 0].reshape(shape)), 1, arrays=True)[:, :, 0], BYTES[:, :, 0])


def test_where_both_layouts_fit_channels_are_last() -> None:
    cube = CHANCE.integers(0, 256, (6, 4, 6), dtype=np.uint8)
    assert np.array_equal(decode(npy(cube), 6, arrays=True), cube)


@pytest.mark.parametrize("channels", [2, 3, 4, 13])
def test_the_encoder_says_which_axis_it_is(channels: int) -> None:
    array = CHANCE.integers(0, 256, (20, 21, channels), dtype=np.uint8)
    for stored in (array, array.transpose(2, 0, 1)):
        assert np.array_equal(decode(npy(stored), channels, arrays=True), array)


def floats(*values: float) -> np.ndarray:
    return np.resize(np.array(values, dtype=np.float32), (4, 4, 6))


REFUSED = {
    "other channels": (
        BYTES[:, :, :5],
        r"is an array \[5, 7, 5\], and encoder.channels is 6, which asks for \[height, width, 6\]",
    ),
    "grey": (BYTES[:, :, 0], r"is an array \[5, 7\], and encoder.channels is 6"),
    "one number": (np.uint8(7), r"is an array \[\], and encoder.channels is 6"),
    "too many axes": (np.zeros((1,) * 30, np.uint8), r"is an array \[1, 1, 1, 1, 1, 1, \.\.\.\], and encoder.channels is 6"),
    "no rows": (np.zeros((0, 7, 6), np.uint8), r"is an array without pixels, \[0, 7, 6\]; take it out"),
    "signed": (BYTES.astype(np.int16), r"holds values of type int16; store uint8, uint16, bool, or floats in 0..1"),
    "32 bits": (BYTES.astype(np.uint32), r"holds values of type uint32; store"),
    "complex": (BYTES.astype(np.complex64), r"holds values of type complex64; store"),
    "more than double": (BYTES.astype(np.longdouble), r"holds values of type (float128|float96); store"),
    "text": (BYTES.astype("S3"), r"holds values of type \|S3; store"),
    "dates": (BYTES.astype("<M8[s]"), r"holds values of type datetime64\[s\]; store"),
    "fields": (
        np.zeros((5, 7, 6), [("a", "u1"), ("b", "u1")]),
        r"holds values of type \[\('a', 'u1'\), \('b', 'u1'\)\]; store",
    ),
    "below 0": (floats(0, 1, -0.5), r"holds floats from -0.5 to 1; only those in 0..1 are read: scale them"),
    "above 1": (floats(0, 1.0000001), r"holds floats from 0 to 1\.0000001\d; only those in 0..1"),
    "no numbers": (floats(0, 1, np.nan), r"holds floats from nan to nan; only those in 0..1"),
    "infinite": (floats(0, 1, np.inf), r"holds floats from 0 to inf; only those in 0..1"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_such_image_is_refused_in_one_line(case: str) -> None:
    array, message = REFUSED[case]
    with pytest.raises(DataError, match=rf"^s\.tar: k\.npy \(byte 512\): {message}") as error:
        decode(npy(array), 6, arrays=True)
    assert "\n" not in str(error.value)


class Trap:
    """Unpickling it leaves a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def headed(header: str, body: int = 96, *, version: tuple[int, int] = (1, 0)) -> bytes:
    length = struct.pack("<H" if version == (1, 0) else "<I", len(header))
    return b"\x93NUMPY" + bytes(version) + length + header.encode("latin1") + bytes(body)


def stating(shape: str, descr: str = "'|u1'", body: int = 96, **options: tuple[int, int]) -> bytes:
    return headed(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n", body, **options)


def pickled(trap: Path) -> bytes:
    array = np.empty((4, 4, 6), dtype=object)
    array[:] = Trap(trap)
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


HEADER, SIZES = "its .npy header cannot be read; write it again", "its .npy header states sizes below 0"
HOSTILE: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "a pickle": (pickled, "holds Python objects, which are never unpickled; store numbers"),
    "a pickle behind fields": (lambda trap: stating("(4,)", "[('a', '|O')]", 32), "holds Python objects"),
    "a call": (lambda trap: headed(f"__import__('os').mkdir('{trap}')"), HEADER),
    "a huge shape": (lambda trap: stating("(100000, 100000, 6)"), "holds 96 bytes of values where .* states 60,000,000,000;"),
    "a shape beyond 64 bits": (
        lambda trap: stating(f"({2**63}, {2**63}, 6)"),
        r"holds 96 bytes of values where .* states 51\d,",
    ),
    "huge items": (lambda trap: stating("(4, 4, 6)", "'|V2000000000'"), "holds 96 bytes of values where .* states 192,0"),
    "cut": (lambda trap: stating("(4, 4, 6)", body=95), "holds 95 bytes of values where .* states 96; fetch it again"),
    "bytes behind": (lambda trap: stating("(4, 4, 6)", body=97), "holds 97 bytes of values where .* states 96;"),
    "sizes below 0": (lambda trap: stating("(-4, -4, 6)"), SIZES),
    "a size below 0": (lambda trap: stating("(-1, 16, 6)"), SIZES),
    "sizes that are no integers": (lambda trap: stating("(4.0, 4, 6)"), HEADER),
    "sizes that are bools": (lambda trap: stating("(True, 16, 6)"), "does not decode"),
    "no tuple": (lambda trap: stating("96"), HEADER),
    "a key too many": (lambda trap: headed("{'descr': '|u1', 'fortran_order': False, 'shape': (4, 4, 6), 'x': 1}"), HEADER),
    "no header": (lambda trap: headed(""), HEADER),
    "only its magic": (lambda trap: b"\x93NUMPY", HEADER),
    "cut in its header": (lambda trap: stating("(4, 4, 6)")[:40], HEADER),
    "a wrong magic": (lambda trap: b"\x93NUMPX" + stating("(4, 4, 6)")[6:], "is no image of a known format"),
    "version 3": (lambda trap: stating("(4, 4, 6)", version=(3, 0)), HEADER),
    "version 9": (lambda trap: stating("(4, 4, 6)", version=(9, 9)), HEADER),
    "a deep header": (lambda trap: headed("(" * 500 + ")" * 500), HEADER),
    "a deep sum": (lambda trap: headed("-" * 1000 + "1"), HEADER),
    "a long header": (lambda trap: headed("{" + " " * 60_000 + "}"), HEADER),
    "a long number": (lambda trap: stating("(" + "9" * 900 + ", 4, 6)"), "holds 96 bytes of values where"),
    "a type of control characters": (lambda trap: stating("(4, 4, 6)", "'\x1b[2J'"), HEADER),
    "Python 2, too long": (lambda trap: stating("(8L, 4L, 6L)"), "holds 96 bytes of values where .* states 192;"),
}


@pytest.mark.filterwarnings("ignore:Reading")  # as the module itself does, but pytest has filters of its own
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_in_one_line(case: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    make, message = HOSTILE[case]
    raw = Raw("k", make(tmp_path / "trap"), None, WHERE)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(DataError, match=rf"^s\.tar: k\.npy \(byte 512\): {message}") as error:
        decode(raw, 6, arrays=True)
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)
    assert not (tmp_path / "trap").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10 and time.monotonic() - began < 5
    assert capfd.readouterr() == ("", "")


def test_sizes_are_judged_by_the_header() -> None:
    array = np.zeros((30, 20, 6), dtype=np.uint16)
    with pytest.raises(DataError, match=r"has more than 599 pixels \(data\.max_pixels\); shrink it"):
        decode(npy(array), 6, arrays=True, max_pixels=599)
    with pytest.raises(DataError, match=r"unfolds to 7,200 bytes, more than 4 x data.max_pixels=1,799; cut it up"):
        decode(npy(array), 6, arrays=True, max_pixels=1799)
    assert decode(npy(array), 6, arrays=True, max_pixels=1800).shape == (30, 20, 6)


def picture(format: str, mode: str = "RGB") -> Raw:
    buffer = io.BytesIO()
    Image.new(mode, (4, 3)).save(buffer, format=format)
    return Raw("k", buffer.getvalue(), None, "w")


@pytest.mark.parametrize(("format", "mode"), [("JPEG", "RGB"), ("PNG", "L"), ("PNG", "LA"), ("GIF", "P"), ("WEBP", "RGBA")])
def test_pictures_have_the_channels_that_pictures_have(format: str, mode: str) -> None:
    for channels in (1, 3, 4):
        raw = picture(format, mode)
        assert np.array_equal(decode(raw, channels, arrays=True), decode(raw, channels))
    for channels in (2, 6):
        with pytest.raises(DataError, match=rf"a {format} has 1, 3 or 4 channels, and encoder.channels is {channels}"):
            decode(picture(format, mode), channels, arrays=True)


def test_without_the_option_it_is_named() -> None:
    with pytest.raises(DataError, match=r"k\.npy .* is an \.npy array; set data\.arrays=true .* to read it, or take it out$"):
        decode(npy(BYTES[:, :, :3]), 3)
    with pytest.raises(ConfigError, match=r"1, 3 or 4 channels, not 6; .*, or data\.arrays=true, which reads \.npy and multi"):
        decode(npy(BYTES), 6)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "lanczos", "box"])
@pytest.mark.parametrize("channels", [2, 4, 5, 6, 9])
def test_views_of_many_channels_are_those_of_each(channels: int, interpolation: str) -> None:
    image = np.random.default_rng(1).integers(0, 256, (50, 70, channels), dtype=np.uint8)
    view = View((20, 28), scale=(0.2, 1.0), flip=0.5, interpolation=interpolation)
    for row in transforms.draw_numbers(view, seed=0, positions=range(4)).tolist():
        each = [show(np.ascontiguousarray(image[:, :, [band]]), view, row) for band in range(channels)]
        assert np.array_equal(show(image, view, row), np.concatenate(each, axis=2))
