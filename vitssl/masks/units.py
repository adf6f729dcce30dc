"""Masks of square units, each several patches wide, so that a model cannot paint from next door (SimMIM, Xie et al. 2022)."""

import torch
from torch import Tensor


def unit_masks(noise: Tensor, units: tuple[int, int], patches: tuple[int, int], num: int) -> Tensor:
    """[B, N] bool, True where masked, in raster order: the ``num`` units with the smallest noise, whole.

    noise: [B, U] uniform, U = rows x columns of ``units``; patches: of each, down and across. N = U x patches of a unit.
    Raises ValueError unless 0 <= num <= U = noise.shape[1].
    """
    total = units[0] * units[1]
    if not (0 <= num <= total == noise.shape[1]):
        raise ValueError(f"cannot mask {num} of {units[0]}x{units[1]} units by noise of {noise.shape[1]}")
    chosen = torch.argsort(noise, dim=1, stable=True)[:, :num]
    mask = torch.zeros_like(noise, dtype=torch.bool).scatter_(1, chosen, True).view(-1, *units)
    return mask.repeat_interleave(patches[0], dim=1).repeat_interleave(patches[1], dim=2).flatten(1)
