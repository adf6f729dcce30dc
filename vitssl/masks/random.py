"""Masks of patches that have nothing to do with each other."""

import torch
from torch import Tensor


def random_keep(noise: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
    """Per-sample random masking without replacement (He et al. 2022, section 3.1).

    noise: [B, N] uniform; the ``num_keep`` patches with the smallest noise are kept, in the order of their noise.
    Returns ``keep`` [B, K] int64 patch indices, and ``mask`` [B, N] bool, True where a patch is removed.
    Raises ValueError unless 1 <= num_keep <= N.
    """
    num_patches = noise.shape[1]
    if not 1 <= num_keep <= num_patches:
        raise ValueError(f"cannot keep {num_keep} of {num_patches} patches")
    keep = torch.argsort(noise, dim=1, stable=True)[:, :num_keep]  # [B, K]
    mask = torch.ones_like(noise, dtype=torch.bool).scatter_(1, keep, False)
    return keep, mask
