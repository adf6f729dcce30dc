"""Colour jitter, greyscale, blur and solarisation on the device, each sample with parameters of its own.

The operations are torchvision's on floating-point images (which differ from those on 8-bit ones by rounding), in the order of
MoCo v3 and BYOL: jitter in a random order of its four, greyscale, blur, solarisation. The numbers are drawn on the host, where
it is decided which samples an operation is for, so no sample pays for what it does not get and nothing waits for a GPU.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from vitssl.views import Photometric

NUM_DRAWS = 13  # per sample: jitter?, four factors, four ranks, greyscale?, blur?, its sigma, solarisation?
_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R 601


def photometric(images: Tensor, change: Photometric, numbers: Tensor) -> Tensor:
    """[B, 3, H, W] float in [0, 1], which it may overwrite -> the same, changed.

    ``numbers`` [B, 13] on the CPU, uniform in [0, 1). Raises ValueError for images of other than three channels.
    """
    if images.shape[1] != 3:
        raise ValueError(f"colours are changed of 3 channels, not {images.shape[1]}")
    one_by_one = images.device.type == "cpu"  # there an image stays in the cache through all that is done to it
    for rows in torch.arange(len(images)).split(1) if one_by_one else [torch.arange(len(images))]:
        _jitter(images, change, numbers, rows)
        _each(images, rows[numbers[rows, 9] < change.grey], lambda x: x.copy_(_grey(x).expand_as(x)))
        chosen = rows[numbers[rows, 10] < change.blur]
        low, high = change.sigma
        _each(images, chosen, _blur, low + (high - low) * numbers[chosen, 11], limit=high)
        _each(images, rows[numbers[rows, 12] < change.solarize], _solarize)
    return images


def _jitter(images: Tensor, change: Photometric, numbers: Tensor, rows: Tensor) -> None:
    rows = rows[numbers[rows, 0] < change.jitter]
    strengths = torch.tensor([change.brightness, change.contrast, change.saturation, change.hue], dtype=torch.float64)
    factors = (2 * numbers[rows, 1:5] - 1) * strengths  # [n, 4] in (-strength, strength)
    factors[:, :3] = (1 + factors[:, :3]).clamp(min=0)
    order = numbers[rows, 5:9].argsort(dim=1)  # [n, 4]
    for slot in range(4):
        for number, (operation, strength) in enumerate(zip(_JITTERS, strengths.tolist(), strict=True)):
            here = order[:, slot] == number
            if strength:
                _each(images, rows[here], operation, factors[here, number])


def _each(images: Tensor, rows: Tensor, operation: Callable[..., object], *parameters: Tensor, **options: float) -> None:
    """Apply an operation, which works in place, to these rows; its parameters are [n] of them."""
    if not len(rows):
        return
    given = [each.to(images.device, images.dtype, non_blocking=True)[:, None, None, None] for each in parameters]
    if len(rows) == 1:
        operation(images[rows[0] : rows[0] + 1], *given, **options)
        return
    index = rows.to(images.device, non_blocking=True)
    some = images[index]
    operation(some, *given, **options)
    images[index] = some


def _grey(images: Tensor) -> Tensor:
    """[n, 3, H, W] -> [n, 1, H, W]."""
    red, green, blue = images.split(1, dim=1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def _brightness(images: Tensor, factor: Tensor) -> None:
    images.mul_(factor).clamp_(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> None:
    mean = _grey(images).mean(dim=(1, 2, 3), keepdim=True)
    images.mul_(factor).add_((1 - factor) * mean).clamp_(0, 1)


def _saturation(images: Tensor, factor: Tensor) -> None:
    grey = _grey(images).mul_(1 - factor)
    images.mul_(factor).add_(grey).clamp_(0, 1)


def _hue(images: Tensor, shift: Tensor) -> None:
    """Turn the hue of HSV by ``shift`` of a circle: out = v - c x clamp(min(k, 4 - k), 0, 1), k = (n + 6 hue) mod 6."""
    red, green, blue = images.split(1, dim=1)
    value = images.amax(dim=1, keepdim=True)
    chroma = value - images.amin(dim=1, keepdim=True)
    inverse = chroma.clamp(min=1e-12).reciprocal_()
    hue = torch.where(
        value == red,
        (green - blue).mul_(inverse),
        torch.where(value == green, (blue - red).mul_(inverse).add_(2), (red - green).mul_(inverse).add_(4)),
    )
    hue.add_(6 * shift)
    for channel, offset in enumerate((5, 3, 1)):
        turned = (hue + offset).remainder_(6)
        turned = torch.minimum(turned, 4 - turned).clamp_(0, 1).mul_(chroma)
        torch.sub(value, turned, out=images[:, channel : channel + 1])


def _blur(images: Tensor, sigma: Tensor, *, limit: float) -> None:
    """Gaussian, in units of pixels, cut at three times the largest sigma there may be; edges are repeated."""
    radius = max(1, math.ceil(3 * (float(sigma) if sigma.device.type == "cpu" and len(sigma) == 1 else limit)))
    number, channels, height, width = images.shape
    places = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (places / sigma[:, 0, 0]) ** 2)  # [n, taps]
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)[:, None]  # [3n, 1, taps]
    planes = functional.pad(images, (radius,) * 4, mode="replicate").view(1, number * channels, height + 2 * radius, -1)
    planes = functional.conv2d(planes, kernel[:, :, None], groups=number * channels)
    planes = functional.conv2d(planes, kernel[..., None], groups=number * channels)
    images.copy_(planes.view(number, channels, height, width))


def _solarize(images: Tensor) -> None:
    """Invert what is at least 128 of 255."""
    images.copy_(torch.where(images >= 128 / 255, 1 - images, images))


_JITTERS = (_brightness, _contrast, _saturation, _hue)
