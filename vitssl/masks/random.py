"""Masks of patches, or of square blocks of them, that have nothing to do with each other."""

import torch
from torch import Tensor

from vitssl.errors import ConfigError


def num_kept(num: int, ratio: float, *, key: str, unit: str = "patches") -> int:
    """How many of ``num`` are kept where ``ratio`` of them are removed, rounded down.

    Raises ConfigError, naming the ``key`` of the ratio, where that is none.
    """
    kept = int(num * (1 - ratio))
    if kept < 1:
        raise ConfigError(f"{key}={ratio} keeps none of {num} {unit}; keep one with at most {1 - 1 / num:.4g}")
    return kept


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


def in_blocks(order: Tensor, grid: tuple[int, int], block: int) -> Tensor:
    """[B, K] int64 numbers of ``block`` x ``block`` blocks -> [B, K x block^2] of their patches, block by block.

    ``grid`` (rows, columns) of patches, which ``block`` divides; blocks and the patches inside one are in raster order.
    """
    patches = torch.arange(grid[0] * grid[1], device=order.device).reshape(grid[0] // block, block, grid[1] // block, block)
    return patches.permute(0, 2, 1, 3).reshape(-1, block * block)[order].flatten(1)


def random_mask(noise: Tensor, num: Tensor) -> Tensor:
    """[B, N] bool: True for the ``num`` [B] patches of each sample with the smallest noise [B, N], as many as it says."""
    return noise.argsort(dim=1, stable=True).argsort(dim=1) < num[:, None]
