"""Images of any number of channels: .npy arrays, and the TIFF files that PIL cannot show whole, to uint8 [H, W, C].

uint8 stays as it is, uint16 keeps its upper byte as that of a 16-bit PNG does, bool is 0 or 255, floats lie in 0..1. Sizes are
judged by the header, before anything is decoded, and nothing is ever unpickled. Surprising: grey is not spread over three
channels here, as it is of pictures: an array has the encoder's number of channels, or it is an error.
"""

import io
import logging
import math
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitssl.data.sources.base import Raw, printable
from vitssl.errors import ConfigError, DataError

_MAGIC = b"\x93NUMPY"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_HEADER = 1024  # characters of an .npy header, which is a literal of Python: three sizes and a type take 128
_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}  # others: named fields
_TYPES = {("b", 1), ("u", 1), ("u", 2), ("f", 2), ("f", 4), ("f", 8)}  # kind and bytes
# Of a TIFF: those whose decoders stop at the size that the header states.
_COMPRESSIONS = {1: "none", 5: "LZW", 8: "deflate", 32946: "deflate", 32773: "PackBits", 34925: "LZMA", 50000: "zstd"}
_DIRECTORIES = 16 << 20  # bytes that the directories of a TIFF may make its reader read; a page's take hundreds
_MARGIN = 64 << 20  # bytes of tiles that may lie beyond the borders of a TIFF
_PAGES = 4096
_SEGMENTS = 1 << 20  # strips or tiles of a page
_SAMPLES = 277  # the tag of a TIFF that says how many values a pixel has
# numpy warns of a header that Python 2 wrote, and PIL complains of many channels: second messages from every worker.
warnings.filterwarnings("ignore", message="Reading `.npy`", category=UserWarning)
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)


class Stored(NamedTuple):
    """An array as its header describes it; ``read()`` gives its values."""

    format: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], NDArray]


def is_npy(content: bytes) -> bool:
    """Whether these bytes begin as an .npy file does."""
    return content.startswith(_MAGIC)


def is_tiff(content: bytes) -> bool:
    """Whether these bytes begin as a TIFF file does, a BigTIFF included."""
    return content.startswith(_TIFF)


def is_array(content: bytes) -> bool:
    """Whether these bytes are to be read as an array: an .npy, or a TIFF of which PIL would show nothing or only a part."""
    return is_npy(content) or (is_tiff(content) and not _shown_whole(content))


def decode_array(raw: Raw, channels: int, *, max_pixels: int) -> NDArray[np.uint8]:
    """An array [H, W], [H, W, C] or [C, H, W] with C = ``channels`` as uint8 [H, W, C]; where both fit, channels are last.

    Raises DataError for another number of channels, another type, values outside 0..1, or sizes beyond ``max_pixels``, of
    which there may be four bytes each; ConfigError where a library is missing; and whatever a damaged TIFF makes its own
    library raise.
    """
    stored = open_array(raw)
    axis = _channel_axis(stored.shape, channels, raw.where)
    height, width = (side for number, side in enumerate(stored.shape) if number != axis)
    if height * width > max_pixels:
        raise Image.DecompressionBombError
    size = math.prod(stored.shape) * stored.dtype.itemsize
    if size > 4 * max_pixels:
        raise DataError(f"{raw.where}: unfolds to {size:,} bytes, more than 4 x data.max_pixels={max_pixels:,}; cut it up")
    values = stored.read()
    values = values[:, :, None] if axis is None else np.moveaxis(values, axis, 2)  # [H, W, C]
    return _to_bytes(values, raw.where)


def open_array(raw: Raw) -> Stored:
    """What the header of an array says. Raises as :func:`decode_array` does."""
    stored = _open_npy(raw) if is_npy(raw.image) else _open_tiff(raw.image)
    if (stored.dtype.kind, stored.dtype.itemsize) not in _TYPES:
        kind = printable(str(stored.dtype))[:60]
        raise DataError(f"{raw.where}: holds values of type {kind}; store uint8, uint16, bool, or floats in 0..1")
    if 0 in stored.shape:
        raise DataError(f"{raw.where}: is an array without pixels, {_said(stored.shape)}; take it out")
    return stored


def _channel_axis(shape: tuple[int, ...], channels: int, where: str) -> int | None:
    """The axis of the channels, None where there is none."""
    if len(shape) == 2 and channels == 1:
        return None
    fitting = [axis for axis in (2, 0) if len(shape) == 3 and shape[axis] == channels]
    if not fitting:
        raise DataError(
            f"{where}: is an array {_said(shape)}, and encoder.channels is {channels}, which asks for"
            f" {'[height, width] or ' if channels == 1 else ''}[height, width, {channels}] or [{channels}, height, width];"
            " correct encoder.channels, or take it out"
        )
    return fitting[0]


def _said(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(f'{side:,}' for side in shape[:6])}{', ...' if len(shape) > 6 else ''}]"


def _to_bytes(values: NDArray, where: str) -> NDArray[np.uint8]:
    """[H, W, C] of any of the types as uint8 of its own memory, since .npy values lie in bytes that nobody may write to."""
    if values.dtype.kind == "f":
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):  # also where they are no numbers
            raise DataError(
                f"{where}: holds floats from {low:.9g} to {high:.9g}; only those in 0..1 are read: scale them, or take it out"
            )
        values = values * values.dtype.type(255) if values.dtype.itemsize > 2 else np.multiply(values, 255, dtype=np.float32)
        np.rint(values, out=values)
    elif values.dtype.kind == "b":
        values = values * np.uint8(255)
    elif values.dtype.itemsize == 2:
        values = values >> 8
    return np.array(values, dtype=np.uint8, order="C")


def _open_npy(raw: Raw) -> Stored:
    file = io.BytesIO(raw.image)
    try:
        shape, by_columns, dtype = _READERS[np.lib.format.read_magic(file)](file, max_header_size=_HEADER)
    except Exception:  # the header of a damaged file may be any text
        raise DataError(f"{raw.where}: its .npy header cannot be read; write it again with numpy.save") from None
    size, rest = math.prod(shape) * dtype.itemsize, len(raw.image) - file.tell()
    if dtype.hasobject:
        raise DataError(f"{raw.where}: holds Python objects, which are never unpickled; store numbers")
    if any(side < 0 for side in shape):
        raise DataError(f"{raw.where}: its .npy header states sizes below 0; write it again with numpy.save")
    if size != rest:
        raise DataError(
            f"{raw.where}: holds {rest:,} bytes of values where its .npy header states {size:,}; fetch it again or take it out"
        )

    def read() -> NDArray:
        values = np.frombuffer(raw.image, dtype=dtype, offset=file.tell())
        return values.reshape(shape, order="F" if by_columns else "C")

    return Stored("NPY", shape, dtype, read)


class _Metered(io.BytesIO):
    """A file of which only ``left`` bytes more may be read: a directory can name the same bytes thousands of times."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.size, self.left = len(content), _DIRECTORIES

    def read(self, size: int | None = -1) -> bytes:
        self._pay(self.size if size is None or size < 0 else size)
        return super().read(size)

    def readinto(self, buffer: Any) -> int:
        self._pay(memoryview(buffer).nbytes)
        return super().readinto(buffer)

    def _pay(self, size: int) -> None:
        self.left -= min(size, max(0, self.size - self.tell()))
        if self.left < 0:
            raise ValueError("its directories name the same bytes many times over")


def _open_tiff(content: bytes) -> Stored:
    """The first page of a TIFF; where its pixels are single values, all pages that are like it, one behind the other."""
    library, source = _library(), _Metered(content)
    # Nothing but pages: none of the arrangements that microscopes have of their own, nor notes in XML that name other files.
    tiff = library.TiffFile(source, is_lsm=False, is_scanimage=False, is_ndpi=False)
    try:
        first = tiff.pages.first
    except IndexError:
        raise ValueError("no page") from None
    pages = [first]
    if len(first.shape) == 2:
        number = 1
        while (page := tiff.pages.get(number, default=first)) is not first:
            pages += [page] if (page.shape, page.dtype) == (first.shape, first.dtype) else []
            number += 1
            if number > _PAGES:
                raise ValueError(f"more than {_PAGES:,} pages")
    for page in pages:
        _refuse_odd(page)
    shape = first.shape if len(pages) == 1 else (len(pages), *first.shape)

    def read() -> NDArray:
        unfolded = sum(math.prod((*page.chunked, *page.chunks, page.dtype.itemsize)) for page in pages)
        if unfolded > max(_MARGIN, 4 * math.prod(shape) * first.dtype.itemsize):
            raise ValueError(f"strips or tiles of {unfolded:,} bytes for an image of {_said(shape)}")
        source.left = 2 * len(content) + _DIRECTORIES
        values = np.empty((len(pages), *first.shape), dtype=first.dtype)
        for number, page in enumerate(pages):
            values[number] = page.asarray(maxworkers=1)
        return values.reshape(shape)

    return Stored("TIFF", shape, first.dtype, read)


def _refuse_odd(page: Any) -> None:
    """ValueError for what is not decoded here: it would be misread, or its size is known only afterwards."""
    if page.dtype is None or page.bitspersample != 8 * page.dtype.itemsize:
        raise ValueError(f"{page.bitspersample} bits a value; store 8, 16, 32 or 64")
    if page.compression not in _COMPRESSIONS:
        names = ", ".join(dict.fromkeys(_COMPRESSIONS.values()))
        raise ValueError(f"compression {int(page.compression)} of several channels; take one of {names}")
    if 0 not in page.shape and math.prod(page.chunked) > _SEGMENTS:
        raise ValueError(f"{math.prod(page.chunked):,} strips or tiles")


def _shown_whole(content: bytes) -> bool:
    """Whether PIL makes of a TIFF all that it holds: every channel, and no page beside one of grey; floats are none of its."""
    try:
        with Image.open(io.BytesIO(content), formats=("TIFF",)) as image:
            bands = len(image.getbands())
            if image.mode == "F" or bands not in (1, 3, 4) or image.tag_v2.get(_SAMPLES, 1) != bands:
                return False
            return bands > 1 or not _goes_on(image)
    except Image.DecompressionBombError:  # its size is the error, whoever reads it
        return True
    except Exception:  # decoders of damaged bytes raise whatever they like
        return False


def _goes_on(image: Image.Image) -> bool:
    try:
        image.seek(1)
    except EOFError:
        return False
    return True


def _library() -> ModuleType:
    """tifffile, told to keep its remarks to itself. Raises ConfigError where it, or what decompresses for it, is missing."""
    try:
        import imagecodecs  # noqa: F401  (without it tifffile unfolds whatever a file holds, however much that is)
        import tifffile
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"data.arrays=true reads multi-channel TIFF with {error.name}, which is not installed; pip install 'vitssl[tiff]'"
        ) from None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # what it has to say is an exception as well
    return tifffile
