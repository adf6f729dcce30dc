"""From encoded bytes to the uint8 pixels a view asks for: decode, crop, resize, flip.

Crops have the semantics of torchvision's ``RandomResizedCrop`` on PIL images (crop first, then resize with antialiasing), but
every random number is that of the sample's global position (:mod:`vitssl.draws`), so no worker or process can change a crop.
Surprising: transparent pixels are laid on white, since what lies below them was never meant to be seen.
"""

import io
import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import simplejpeg
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from vitssl import draws
from vitssl.data.arrays import decode_array, is_array, is_npy, is_tiff
from vitssl.data.sources.base import Raw, printable
from vitssl.errors import ConfigError, DataError, UserError
from vitssl.views import View

Pixels = NDArray[np.uint8]
"""An image [H, W, C]."""
Augment = Callable[[Image.Image, int], Image.Image]
"""``augment(image, seed) -> image`` of the same size: what a view's pixels go through after crop and flip."""

NUM_DRAWS = 23  # per sample and view: ten areas, ten aspect ratios, top, left, flip
MAX_PIXELS = 89_478_485  # of one image, PIL's limit: 256 MiB of RGB
_ATTEMPTS = 10
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")  # never those that run a program (EPS) or read other files
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}
# PIL warns where decode() raises; the warning would be a second message from every worker.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def check_channels(channels: int, *, arrays: bool) -> None:
    """Raise ConfigError for a number of channels that no image would have."""
    if channels not in _MODES and not arrays:
        raise ConfigError(
            f"images decode to 1, 3 or 4 channels, not {channels}; set the encoder's channels to one of these, or"
            " data.arrays=true, which reads .npy and multi-channel .tif"
        )


def decode(raw: Raw, channels: int = 3, *, exif: bool = False, max_pixels: int = MAX_PIXELS, arrays: bool = False) -> Pixels:
    """Decode an image of any mode to uint8 [H, W, C] (``channels`` 1, 3 or 4); the first frame of an animation.

    ``exif`` turns and mirrors it as its camera noted; ``max_pixels`` are judged by the header, before anything is decoded.
    ``arrays`` reads what :mod:`vitssl.data.arrays` describes as well, of any number of channels.

    16-bit values keep their upper byte. Raises DataError naming ``raw.where``: no bytes, not an image, damaged, too many
    pixels, other channels than asked for, or floating-point pixels, whose range nobody states.
    """
    check_channels(channels, arrays=arrays)
    if raw.problem:
        raise DataError(raw.problem)
    try:
        if arrays and (is_array(raw.image) or (channels not in _MODES and is_tiff(raw.image))):
            return decode_array(raw, channels, max_pixels=max_pixels)
        jpeg = channels == 3 and raw.image.startswith(b"\xff\xd8\xff")
        pixels = _decode_jpeg(raw.image, max_pixels) if jpeg else None
        pixels = _decode_any(raw.image, channels, max_pixels) if pixels is None else pixels
        return _upright(pixels, raw.image) if exif else pixels
    except Image.DecompressionBombError:
        raise DataError(
            f"{raw.where}: has more than {max_pixels:,} pixels (data.max_pixels); shrink it or take it out"
        ) from None
    except UnidentifiedImageError:
        raise DataError(f"{raw.where}: {_unknown(raw.image)}") from None
    except UserError:
        raise
    except Exception as error:  # decoders of damaged bytes raise whatever they like
        reason = printable(" ".join(str(error).split())) or type(error).__name__
        raise DataError(f"{raw.where}: does not decode ({reason}); replace it or take it out") from None


def _unknown(content: bytes) -> str:
    """What to say of bytes that PIL makes nothing of."""
    option = "set data.arrays=true (for vitssl check: --channels)"
    if is_npy(content):
        return f"is an .npy array; {option} to read it, or take it out"
    if is_tiff(content):
        return f"is no TIFF of a plain picture; {option} if it holds other channels, or take it out"
    what = f"is no image of a known format ({len(content):,} bytes)" if content else "is empty"
    return f"{what}; replace it or take it out"


def extension(raw: Raw) -> str:
    """How a file with these bytes would end. Raises DataError where they are no image."""
    if is_array(raw.image):
        return "npy" if is_npy(raw.image) else "tiff"
    try:
        with Image.open(io.BytesIO(raw.image), formats=FORMATS) as image:
            return {"JPEG": "jpg", "MPO": "jpg"}.get(image.format, image.format.lower())
    except Exception:  # as above
        raise DataError(f"{raw.where}: is no image of a known format; replace it or take it out") from None


def _decode_jpeg(content: bytes, max_pixels: int) -> Pixels | None:
    """The common case, a third faster than by PIL; None for what PIL is to judge: other colours, and anything odd."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        if height * width > max_pixels:
            raise Image.DecompressionBombError
        return simplejpeg.decode_jpeg(content, "RGB") if colours in ("YCbCr", "RGB", "Gray") else None
    except ValueError:
        return None


def _decode_any(content: bytes, channels: int, max_pixels: int) -> Pixels:
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # it raises at twice its own
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.width * image.height > max_pixels:
        raise Image.DecompressionBombError
    if channels not in _MODES:
        raise ValueError(f"a {image.format} has 1, 3 or 4 channels, and encoder.channels is {channels}")
    image.load()
    if image.mode != _MODES[channels] or "transparency" in image.info:
        image = _converted(image, channels)
    return _pixels(image)


_TURNS: dict[int, Callable[[Pixels], Pixels]] = {  # EXIF orientation -> what makes it upright
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: image.transpose(1, 0, 2)[:, ::-1],
    7: lambda image: image[::-1, ::-1].transpose(1, 0, 2),
    8: lambda image: image.transpose(1, 0, 2)[::-1],
}


def _upright(pixels: Pixels, content: bytes) -> Pixels:
    with Image.open(io.BytesIO(content), formats=FORMATS) as header:
        turn = _TURNS.get(header.getexif().get(ExifTags.Base.Orientation, 1))
    return np.ascontiguousarray(turn(pixels)) if turn else pixels


def _pixels(image: Image.Image) -> Pixels:
    found = np.array(image)
    return found if found.ndim == 3 else found[:, :, None]


def draw_numbers(view: View, *, seed: int, positions: ArrayLike) -> NDArray[np.float64]:
    """[B, 23] uniform numbers: those of this view for the samples at these global positions."""
    positions = torch.as_tensor(np.asarray(positions, dtype=np.int64))
    return draws.uniform(seed, view.purpose, positions, NUM_DRAWS).numpy()


def show(
    image: Pixels, view: View, numbers: Sequence[float], *, augment: Augment | None = None, augment_seed: int = 0
) -> Pixels:
    """One view of a decoded image [H, W, C] as uint8 [height, width, C] (channels last, as :func:`stacked` leaves them).

    ``numbers`` are the sample's row of :func:`draw_numbers`. ``augment(image, augment_seed)`` is applied after the flip.
    """
    height, width = view.size
    if view.scale is None:
        image = _without_ends(image, view)
        columns, rows = _covering_size(image.shape[1], image.shape[0], view)
        image = resized(image, rows, columns, view.interpolation)
        top, left = round((rows - height) / 2), round((columns - width) / 2)
        image = image[top : top + height, left : left + width]
    else:
        left, top, crop_width, crop_height = crop_box(image.shape[1], image.shape[0], view, numbers)
        image = resized(image[top : top + crop_height, left : left + crop_width], height, width, view.interpolation)
    if numbers[22] < view.flip:
        image = torch.from_numpy(image).flip(1).numpy()  # numpy takes ten times as long
    if augment is not None:
        image = _pixels(augment(_picture(image), augment_seed))
    return image


def stacked(images: Sequence[Pixels], view: View, channels: int) -> Tensor:
    """Views [height, width, C] -> uint8 [B, C, height, width], its channels last in memory as decoders and resizes leave them.

    The device turns them round as it makes numbers of them; here that would take a third as long as a resize.
    """
    batch = np.empty((len(images), *view.size, channels), dtype=np.uint8)
    for row, image in enumerate(images):
        batch[row] = image
    return torch.from_numpy(batch).permute(0, 3, 1, 2)


def resized(image: Pixels, height: int, width: int, interpolation: str) -> Pixels:
    """Antialiased as by PIL (0.04 of 255 away from it in the mean); torch's vector code takes a third of its time."""
    if image.shape[:2] == (height, width):
        return image
    by_torch, channels = interpolation in ("bicubic", "bilinear"), image.shape[2]
    if channels > 4 or (not by_torch and channels not in (1, 3)):  # torch is slow beyond 4, and PIL would see a picture's alpha
        step = 4 if by_torch else 1
        parts = [resized(image[:, :, first : first + step], height, width, interpolation) for first in range(0, channels, step)]
        return np.concatenate(parts, axis=2)
    if by_torch:
        # [1, C, H, W], channels last. Were the 1 put in front after the permutation, its stride would hide that from torch,
        # which would take the image apart into planes: half as long again.
        planes = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
        planes = functional.interpolate(planes, (height, width), mode=interpolation, antialias=True)
        return planes[0].permute(1, 2, 0).numpy()
    return _pixels(_picture(image).resize((width, height), _RESAMPLING[interpolation]))


def _picture(image: Pixels) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image[:, :, 0] if image.shape[2] == 1 else image))


def crop_box(width: int, height: int, view: View, numbers: Sequence[float]) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a random resized crop, as torchvision's ``RandomResizedCrop.get_params`` takes it.

    Up to ten attempts with an area uniform in ``view.scale`` and an aspect ratio log-uniform in ``view.ratio``, rounded, at a
    uniform place; the first that fits counts. Then the largest centre crop whose aspect ratio lies in ``view.ratio``.
    """
    low, high = view.scale
    log_low, log_high = math.log(view.ratio[0]), math.log(view.ratio[1])
    for attempt in range(_ATTEMPTS):
        area = width * height * (low + (high - low) * numbers[attempt])
        ratio = math.exp(log_low + (log_high - log_low) * numbers[_ATTEMPTS + attempt])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(numbers[21] * (width - w + 1)), int(numbers[20] * (height - h + 1)), w, h
    w, h = width, height
    if width / height < min(view.ratio):
        h = max(1, round(width / min(view.ratio)))
    elif width / height > max(view.ratio):
        w = max(1, round(height * max(view.ratio)))
    return (width - w) // 2, (height - h) // 2, w, h


def _covering_size(width: int, height: int, view: View) -> tuple[int, int]:
    """(width, height) after the short side was resized to ``view.resize``; never smaller than the view itself."""
    target_height, target_width = view.size
    if view.resize is not None:
        short = min(width, height)
        size = int(view.resize * width / short), int(view.resize * height / short)
        if size[0] >= target_width and size[1] >= target_height:
            return size
    if target_width * height >= target_height * width:
        return target_width, int(target_width * height / width)
    return int(target_height * width / height), target_height


def _without_ends(image: Pixels, view: View) -> Pixels:
    """The middle of an image so long and thin that resizing all of it would take gigabytes; others as they are."""
    height, width = image.shape[:2]
    longest = 256 * min(width, height) * max(view.size) // min(view.size)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    return image[top : top + longest, left : left + longest]


def _converted(image: Image.Image, channels: int) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        if image.mode == "F":
            other = ", or set data.arrays=true if they lie in 0..1" if (image.format, channels) == ("TIFF", 1) else ""
            raise ValueError(f"floating-point pixels have no stated range; store 8 or 16 bits{other}")
        image = Image.fromarray((np.clip(np.asarray(image, dtype=np.int64), 0, 65535) >> 8).astype(np.uint8))
    if channels != 4 and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(_MODES[channels])
