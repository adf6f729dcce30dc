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
            if number == 3:
                found += _turns(turn) if strength else []
            else:
                found += [(_JITTERS[number], max(0.0, 1 + turn))] if strength else []
    found += [(_discolour, 0.0)] if row[9] < change.grey else []
    low, high = change.sigma
    found += [(_blur, low + (high - low) * row[11])] if row[10] < change.blur else []
    return found + ([(_solarize, 0.0)] if row[12] < change.solarize else [])


def _turns(shift: float) -> list[tuple[Callable[[Tensor, Any], None], float]]:
    """A hue's turn by ``shift`` of a circle, in as many parts of at most a sixth as it takes."""
    parts = max(1, math.ceil(6 * abs(shift)))
    return [(_hue_forth if shift >= 0 else _hue_back, abs(shift) / parts)] * parts


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
    _cut(images.mul_(factor), factor)


def _contrast(images: Tensor, factor: Tensor | float) -> None:
    mean = _grey(images.mean(dim=(2, 3), keepdim=True))  # of the grey image too: its weights are the same everywhere
    _cut(torch.lerp(mean, images, factor, out=images), factor)


def _saturation(images: Tensor, factor: Tensor | float) -> None:
    _cut(torch.lerp(_grey(images), images, factor, out=images), factor)


def _cut(images: Tensor, factor: Tensor | float) -> None:
    """To [0, 1], which only factors above 1 leave."""
    if isinstance(factor, Tensor) or factor > 1:
        images.clamp_(0, 1)


def _hue_forth(images: Tensor, shift: Tensor | float) -> None:
    """Turn the hue of HSV by ``shift`` of a circle, from red towards green."""
    _turn_hue(*images.split(1, dim=1), shift)


def _hue_back(images: Tensor, shift: Tensor | float) -> None:
    red, green, blue = images.split(1, dim=1)
    _turn_hue(red, blue, green, shift)


def _turn_hue(first: Tensor, second: Tensor, third: Tensor, shift: Tensor | float) -> None:
    """Turn the hue from the first towards the second channel by at most a sixth of a circle, value and chroma as they are.

    Along HSV's hexagon a channel is a plateau with two ramps. For so small a turn both ramps, moved, are linear in the three
    channels as they were; so no hue is computed, nothing is divided, and greys need no case of their own.
    """
    most = torch.maximum(torch.maximum(first, second), third)
    least = torch.minimum(torch.minimum(first, second), third)
    chroma, turn = most - least, 6 * shift
    low, high = chroma * (1 - turn), (chroma * (1 + turn)).add_(least, alpha=2)
    cycle = (first, second, third), (second, third, first), (third, first, second)
    turned = [(before + low).clamp_(max=high - before).add_(own).sub_(after) for own, after, before in cycle]
    for own, found in zip((first, second, third), turned, strict=True):
        torch.clamp(found, least, most, out=own)


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
            for shifted in (wide.narrow(dim, radius - place, size), wide.narrow(dim, radius + place, size)):
                images.addcmul_(shifted, weights[place]) if together else images.add_(shifted, alpha=weights[place])


def _solarize(images: Tensor, _: Any) -> None:
    """Invert what is brighter than half (of 8-bit values: what is at least 128)."""
    torch.minimum(images, 1 - images, out=images)


_JITTERS = (_brightness, _contrast, _saturation)
