"""From encoded bytes to the uint8 pixels a view asks for: decode, crop, resize, flip.

Crops have the semantics of torchvision's ``RandomResizedCrop`` (crop first, then resize with antialiasing, both by PIL), but
every random number is that of the sample's global position (:mod:`vitssl.draws`), so no worker or process can change a crop.
Surprising: transparent pixels are laid on white, since what lies below them was never meant to be seen.
"""

import io
import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image, UnidentifiedImageError

from vitssl import draws
from vitssl.data.sources.base import Raw
from vitssl.errors import ConfigError, DataError
from vitssl.views import View

Augment = Callable[[Image.Image, int], Image.Image]
"""``augment(image, seed) -> image`` of the same size: what a view's pixels go through after crop and flip."""

NUM_DRAWS = 23  # per sample and view: ten areas, ten aspect ratios, top, left, flip
MAX_PIXELS = 89_478_485  # of one image, PIL's limit: 256 MiB of RGB
_ATTEMPTS = 10
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")  # never those that run a program (EPS) or read other files
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}
# PIL warns where decode() raises; the warning would be a second message from every worker.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode(raw: Raw, channels: int = 3) -> Image.Image:
    """Decode an image of any PIL mode to mode L, RGB or RGBA (``channels`` 1, 3 or 4); the first frame of an animation.

    16-bit values keep their upper byte. Raises DataError naming ``raw.where``: not an image, damaged, too many pixels, or
    floating-point pixels, whose range nobody states.
    """
    if channels not in _MODES:
        raise ConfigError(f"images decode to 1, 3 or 4 channels, not {channels}; set the encoder's channels to one of these")
    try:
        image = Image.open(io.BytesIO(raw.image), formats=_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        image.load()
        if image.mode == _MODES[channels] and "transparency" not in image.info:
            return image
        return _converted(image, channels)
    except Image.DecompressionBombError:
        raise DataError(f"{raw.where}: has more than {MAX_PIXELS:,} pixels; shrink it or take it out") from None
    except UnidentifiedImageError:
        what = "is empty" if not raw.image else f"is no image of a known format ({len(raw.image):,} bytes)"
        raise DataError(f"{raw.where}: {what}; replace it or take it out") from None
    except Exception as error:  # decoders of damaged bytes raise whatever they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{raw.where}: does not decode ({reason}); replace it or take it out") from None


def draw_numbers(view: View, *, seed: int, positions: ArrayLike) -> NDArray[np.float64]:
    """[B, 23] uniform numbers: those of this view for the samples at these global positions."""
    positions = torch.as_tensor(np.asarray(positions, dtype=np.int64))
    return draws.uniform(seed, view.purpose, positions, NUM_DRAWS).numpy()


def show(
    image: Image.Image, view: View, numbers: Sequence[float], *, augment: Augment | None = None, augment_seed: int = 0
) -> NDArray[np.uint8]:
    """One view of a decoded image as uint8 [height, width, C] (channels last: the batch is turned round at once).

    ``numbers`` are the sample's row of :func:`draw_numbers`. ``augment(image, augment_seed)`` is applied after the flip.
    """
    height, width = view.size
    resample = _RESAMPLING[view.interpolation]
    if view.scale is None:
        image = _without_ends(image, view)
        resized = _covering_size(image.width, image.height, view)
        image = image if image.size == resized else image.resize(resized, resample)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        box = (left, top, left + width, top + height)
    else:
        left, top, crop_width, crop_height = crop_box(image.width, image.height, view, numbers)
        box = (left, top, left + crop_width, top + crop_height)
    if box != (0, 0, *image.size):
        image = image.crop(box)
    if image.size != (width, height):
        image = image.resize((width, height), resample)
    if numbers[22] < view.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if augment is not None:
        image = augment(image, augment_seed)
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


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


def _without_ends(image: Image.Image, view: View) -> Image.Image:
    """The middle of an image so long and thin that resizing all of it would take gigabytes; others as they are."""
    width, height = image.size
    longest = 256 * min(width, height) * max(view.size) // min(view.size)
    w, h = min(width, longest), min(height, longest)
    left, top = (width - w) // 2, (height - h) // 2
    return image if (w, h) == image.size else image.crop((left, top, left + w, top + h))


def _converted(image: Image.Image, channels: int) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        if image.mode == "F":
            raise ValueError("floating-point pixels have no stated range; store 8 or 16 bits")
        image = Image.fromarray((np.clip(np.asarray(image, dtype=np.int64), 0, 65535) >> 8).astype(np.uint8))
    if channels != 4 and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(_MODES[channels])
