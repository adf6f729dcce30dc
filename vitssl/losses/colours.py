"""Colours as classes: what the ViT paper's patch prediction asks for."""

import torch
from torch import Tensor

from vitssl.losses.pixels import patchify


def mean_colours(images: Tensor, patch: tuple[int, int], *, bits: int = 3) -> Tensor:
    """[B, C, H, W] in [0, 1] -> [B, N] int64: the mean colour of each patch, ``bits`` per channel, the first the most.

    Each channel's mean falls into one of 2^bits equal parts of [0, 1]: 512 classes of three channels at 3 bits (Dosovitskiy
    et al. 2021, appendix B.1.2).
    """
    levels = 2**bits
    means = patchify(images, patch).unflatten(-1, (-1, images.shape[1])).mean(dim=-2)  # [B, N, C]
    digits = (means * levels).floor().to(torch.int64).clamp(0, levels - 1)
    weights = levels ** torch.arange(images.shape[1] - 1, -1, -1, device=images.device)
    return (digits * weights).sum(dim=-1)
