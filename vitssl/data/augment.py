"""What changes pixels and not places: normalisation on the device, and timm's RandAugment for fine-tuning.

timm's RandAugment draws from the global generators of ``random`` and numpy. It runs here under both, seeded with the hash of
the sample and put back afterwards, so an augmented image is a function of (seed, position) like everything else.
"""

import random
import re
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitssl.errors import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_CONFIG = r"rand(-(m|n|p|mstd|mmax|inc)\d[\d.]*|-t(weights|3aw?))*"


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [B, C, H, W] -> float32 [B, C, H, W]: (pixel / 255 - mean) / std; ``mean`` and ``std`` [C] of values 0-1."""
    scaled = images.to(torch.float32).div_(255)
    return scaled.sub_(mean.to(scaled)[:, None, None]).div_(std.to(scaled)[:, None, None])


def rand_augment(config: str, *, mean: tuple[float, ...] = IMAGENET_MEAN, size: int = 224) -> "RandAugment":
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

    return RandomErasing(probability, mode="pixel", device="cpu")


class RandAugment:
    """``augment(image, seed) -> image``: RandAugment of one PIL image, the same for the same seed. Picklable."""

    def __init__(self, config: str, *, mean: tuple[float, ...] = IMAGENET_MEAN, size: int = 224) -> None:
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

    def __call__(self, image: Image.Image, seed: int) -> Image.Image:
        kept, kept_numpy = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        try:
            return self._transform(image)
        finally:
            random.setstate(kept)
            np.random.set_state(kept_numpy)
