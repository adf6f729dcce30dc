"""What changes pixels and not places: normalisation on the device, and timm's RandAugment for fine-tuning.

timm's RandAugment draws from the global generators of ``random`` and numpy. It runs here under both, seeded with the hash of
the sample and put back afterwards, so an augmented image is a function of (seed, position) like everything else.
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from vitssl import draws
from vitssl.data import photometric
from vitssl.errors import ConfigError
from vitssl.task import Batch
from vitssl.views import View, purpose

_CONFIG = r"rand(-(m|n|p|mstd|mmax|inc)\d[\d.]*|-t(weights|3aw?))*"


_COLOURS = purpose("colours")


def seen(batch: Batch, view: View, normalize: "Normalize", *, seed: int) -> Tensor:
    """[B, C, H, W] float32 on the batch's device: a view, its colours changed as (seed, position) say, normalised."""
    pixels = batch.views[view]
    if not view.photometric.changes:
        return normalize(pixels)
    positions = batch.positions if batch.host is None else batch.host
    numbers = draws.uniform(seed, draws.fold(_COLOURS, view.purpose), positions, photometric.NUM_DRAWS)
    images = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device)
    at_once = 1 if pixels.device.type == "cpu" else len(pixels)  # there an image stays in the cache until it is done
    for some, own, into in zip(pixels.split(at_once), numbers.split(at_once), images.split(at_once), strict=True):
        into.copy_(some).mul_(1 / 255)  # two simple passes: one that turns bytes round and multiplies takes longer on a CPU
        normalize.in_place(photometric.photometric(into, view.photometric, own))
    return images


class Normalize(nn.Module):
    """uint8 [B, C, H, W] -> float32 [B, C, H, W]: (pixel / 255 - mean) / std; ``mean`` and ``std`` [C] in units of [0, 1].

    Its numbers follow a module to its device and are no part of its state. Raises ConfigError where they do not fit C.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, channels: int) -> None:
        super().__init__()
        if not len(mean) == len(std) == channels:
            raise ConfigError(
                f"data.mean has {len(mean)} and data.std {len(std)} values for encoder.channels={channels}; "
                f"give one of each per channel (vitssl check DATA --channels={channels} finds them)"
            )
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.in_place(images.to(torch.float32, memory_format=torch.contiguous_format).div_(255))

    def in_place(self, images: Tensor) -> Tensor:
        """float [B, C, H, W] in [0, 1] -> the same tensor, normalised."""
        return images.sub_(self.mean).div_(self.std)

    def pixels(self, images: Tensor) -> Tensor:
        """[..., C, H, W] normalised -> as before, in units of [0, 1]."""
        return images * self.std + self.mean

    def restore(self, images: Tensor) -> Tensor:
        """[..., C, H, W] normalised, or predicted, -> pixels in [0, 1], cut there."""
        return self.pixels(images.float()).clamp(0, 1)


def rand_augment(config: str, *, mean: Sequence[float], size: int = 224) -> "RandAugment":
    """timm's RandAugment (Cubuk et al. 2020) from its own configuration string, such as MAE's ``rand-m9-mstd0.5-inc1``.

    ``mean`` fills what a shift uncovers; ``size`` (pixels of the shorter side) bounds shifts, as timm itself does; rotations
    and shears are bicubic, as in MAE's fine-tuning. Raises ConfigError for a string timm does not understand or would ignore.
    """
    return RandAugment(config, mean=mean, size=size)


def mixer(
    mixup: float, cutmix: float, *, switch: float, num_classes: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """timm's mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019) with alphas ``mixup`` and ``cutmix``; None if both are 0.

    images [B, C, H, W], labels [B] -> images, targets [B, num_classes]. Label smoothing is left to the loss. It draws from
    numpy's global generator, so whoever calls it seeds that.
    """
    if not (mixup or cutmix):
        return None
    from timm.data.mixup import Mixup

    return Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, switch_prob=switch, label_smoothing=0.0, num_classes=num_classes)


def erasing(probability: float) -> Callable[[Tensor], Tensor] | None:
    """timm's random erasing (Zhong et al. 2020) with noise per pixel, on normalised images [B, C, H, W]; None if off.

    It draws from the global generators of ``random`` and torch, so whoever calls it seeds those.
    """
    if not probability:
        return None
    from timm.data.random_erasing import RandomErasing

    eraser = RandomErasing(probability, mode="pixel", device="cpu")

    def erase(images: Tensor) -> Tensor:
        eraser.device = images.device  # where it draws its noise
        return eraser(images)

    return erase


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's, as the official codes ran it: of 0 bits the image is black. Pillow 13 refuses what older ones did."""
    return image if bits >= 8 else ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


class RandAugment:
    """``augment(image, seed) -> image``: RandAugment of one PIL image, the same for the same seed. Picklable."""

    def __init__(self, config: str, *, mean: Sequence[float], size: int) -> None:
        from timm.data.auto_augment import rand_augment_transform  # imports torchvision: only where it is asked for

        self.config = config
        fill = tuple(min(255, round(255 * value)) for value in mean)
        options = {"translate_const": int(size * 0.45), "img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
        try:
            if not re.fullmatch(_CONFIG, config):  # timm ignores a part without digits
                raise ValueError("its parts are m, n, p, mstd, mmax or inc and a number, or tweights, t3a, t3aw")
            self._transform = rand_augment_transform(config, options)
        except (AssertionError, ValueError, KeyError) as error:
            reason = f" ({error})" if str(error) else ""
            raise ConfigError(
                f"augment.rand_augment={config!r} is no RandAugment of timm{reason}; write for example rand-m9-mstd0.5-inc1"
            ) from None
        for operation in self._transform.ops:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize

    def __call__(self, image: Image.Image, seed: int) -> Image.Image:
        kept, kept_numpy = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        try:
            return self._transform(image)
        finally:
            random.setstate(kept)
            np.random.set_state(kept_numpy)
