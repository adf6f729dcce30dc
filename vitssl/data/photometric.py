"""Colour jitter, greyscale, blur and solarisation on the device, each sample with parameters of its own.

The operations are torchvision's on floating-point images (which differ from those on 8-bit ones by rounding), in the order of
MoCo v3 and BYOL: jitter in a random order of its four, greyscale, blur, solarisation. The numbers are drawn on the host, where
it is decided which samples an operation is for, so no sample pays for what it does not get and nothing waits for a GPU.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vitssl.views import Photometric

NUM_DRAWS = 13  # per sample: jitter?, four factors, four ranks, greyscale?, blur?, its sigma, solarisation?
_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R 601


def photometric(images: Tensor, change: Photometric, numbers: Tensor) -> Tensor:
    """[B, 3, H, W] float in [0, 1], which it overwrites -> the same, changed.

    ``numbers`` [B, 13] on the CPU, uniform in [0, 1). Raises ValueError for images of other than three channels.
    """
    if images.shape[1] != 3:
        raise ValueError(f"colours are changed of 3 channels, not {images.shape[1]}")
    rows = numbers.tolist()
    if images.device.type == "cpu":  # there an image stays in the cache through all that is done to it
        for image, row in zip(images.split(1), rows, strict=True):
            for operation, parameter in _plan(change, row):
                operation(image, parameter)
        return images
    for step in _together([_plan(change, row) for row in rows]):
        for operation, (chosen, parameters) in step.items():
            index = torch.tensor(chosen).to(images.device, non_blocking=True)
            values = torch.tensor(parameters, dtype=images.dtype).to(images.device, non_blocking=True)
            some = images[index]
            operation(some, values[:, None, None, None], *([max(parameters)] if operation is _blur else []))
            images[index] = some
    return images


def _plan(change: Photometric, row: list[float]) -> list[tuple[Callable[[Tensor, Any], None], float]]:
    """The operations on a sample, in order, each with its parameter."""
    found: list[tuple[Callable[[Tensor, Any], None], float]] = []
    if row[0] < change.jitter:
        for number in sorted(range(4), key=lambda each: row[5 + each]):
            strength = (change.brightness, change.contrast, change.saturation, change.hue)[number]
            turn = (2 * row[1 + number] - 1) * strength  # in (-strength, strength)
            found += [(_JITTERS[number], turn if number == 3 else max(0.0, 1 + turn))] if strength else []
    found += [(_discolour, 0.0)] if row[9] < change.grey else []
    low, high = change.sigma
    found += [(_blur, low + (high - low) * row[11])] if row[10] < change.blur else []
    return found + ([(_solarize, 0.0)] if row[12] < change.solarize else [])


def _together(plans: list[list]) -> Iterator[dict[Callable, tuple[list[int], list[float]]]]:
    """The same for a batch: step after step, which samples an operation is for, and their parameters."""
    for step in range(max(map(len, plans), default=0)):
        groups: dict[Callable, tuple[list[int], list[float]]] = {}
        for sample, plan in enumerate(plans):
            if step < len(plan):
                operation, parameter = plan[step]
                chosen, parameters = groups.setdefault(operation, ([], []))
                chosen.append(sample)
                parameters.append(parameter)
        yield groups


def _grey(images: Tensor) -> Tensor:
    """[n, 3, H, W] -> [n, 1, H, W]."""
    red, green, blue = images.split(1, dim=1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def _discolour(images: Tensor, _: Any) -> None:
    images.copy_(_grey(images).expand_as(images))


def _brightness(images: Tensor, factor: Tensor | float) -> None:
    images.mul_(factor).clamp_(0, 1)


def _contrast(images: Tensor, factor: Tensor | float) -> None:
    mean = _grey(images).mean(dim=(1, 2, 3), keepdim=True)
    images.mul_(factor).add_((1 - factor) * mean).clamp_(0, 1)


def _saturation(images: Tensor, factor: Tensor | float) -> None:
    grey = _grey(images).mul_(1 - factor)
    images.mul_(factor).add_(grey).clamp_(0, 1)


def _hue(images: Tensor, shift: Tensor | float) -> None:
    """Turn the hue of HSV by ``shift`` of a circle. With it in [0, 6) red is v - c + c clamp(|h - 3| - 1, 0, 1), green and
    blue v - c clamp(|h - 2| - 1, 0, 1) and v - c clamp(|h - 4| - 1, 0, 1)."""
    red, green, blue = images.split(1, dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    inverse = chroma.clamp(min=1e-12).reciprocal_()
    other_than_green, other_than_red = (value - green).sign_(), (value - red).sign_()  # 0 where it is the largest, else 1
    hue = torch.lerp((blue - red).mul_(inverse).add_(2), (red - green).mul_(inverse).add_(4), other_than_green)
    hue = torch.lerp((green - blue).mul_(inverse), hue, other_than_red).add_(6 * shift)
    hue.sub_((hue * (1 / 6)).floor_().mul_(6))  # several times faster than a remainder, as lerp is than where
    least = value - chroma
    torch.addcmul(least, (hue - 3).abs_().sub_(1).clamp_(0, 1), chroma, out=red)
    torch.addcmul(value, (hue - 2).abs_().sub_(1).clamp_(0, 1), chroma, value=-1, out=green)
    torch.addcmul(value, (hue - 4).abs_().sub_(1).clamp_(0, 1), chroma, value=-1, out=blue)


def _blur(images: Tensor, sigma: Tensor | float, widest: float | None = None) -> None:
    """Gaussian of ``sigma`` pixels, cut at three times that (of several, at three times the ``widest``); edges are repeated."""
    together = isinstance(sigma, Tensor)
    radius = max(1, math.ceil(3 * (widest if together else sigma)))
    if together:
        weights = [torch.exp(-0.5 * (place / sigma) ** 2) for place in range(radius + 1)]
    else:
        weights = [math.exp(-0.5 * (place / sigma) ** 2) for place in range(radius + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    weights = [weight / total for weight in weights]
    for dim in (2, 3):
        size = images.shape[dim]
        pads = (0, 0, radius, radius) if dim == 2 else (radius, radius, 0, 0)
        wide = functional.pad(images, pads, mode="replicate")
        torch.mul(wide.narrow(dim, radius, size), weights[0], out=images)
        for place in range(1, radius + 1):  # sums of shifted images: several times faster than a convolution on a CPU
            pair = wide.narrow(dim, radius - place, size) + wide.narrow(dim, radius + place, size)
            images.add_(pair.mul_(weights[place])) if together else images.add_(pair, alpha=weights[place])


def _solarize(images: Tensor, _: Any) -> None:
    """Invert what is brighter than half (of 8-bit values: what is at least 128)."""
    torch.minimum(images, 1 - images, out=images)


_JITTERS = (_brightness, _contrast, _saturation, _hue)
