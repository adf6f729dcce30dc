"""What is painted: pixels as targets. B images, C channels, N patches, P = ph * pw * C numbers in a patch."""

import torch
from torch import Tensor


def patchify(images: Tensor, patch: tuple[int, int], *, channels_first: bool = False) -> Tensor:
    """[B, C, H, W] -> [B, N, P]: patches in raster order, numbers in the order (row, column, channel).

    He et al. 2022, official code; SimMIM's head orders (channel, row, column) instead: ``channels_first``. ``patch`` (ph, pw)
    divides (H, W).
    """
    batch, channels, height, width = images.shape
    rows, columns = height // patch[0], width // patch[1]
    x = images.reshape(batch, channels, rows, patch[0], columns, patch[1])
    x = x.permute(0, 2, 4, 1, 3, 5) if channels_first else x.permute(0, 2, 4, 3, 5, 1)
    return x.reshape(batch, rows * columns, patch[0] * patch[1] * channels)


def unpatchify(patches: Tensor, patch: tuple[int, int], grid: tuple[int, int], *, channels_first: bool = False) -> Tensor:
    """[B, N, P] -> [B, C, H, W], the inverse of :func:`patchify`; ``grid`` (rows, columns) with N = rows * columns."""
    if channels_first:
        x = patches.reshape(len(patches), *grid, -1, *patch).permute(0, 3, 1, 4, 2, 5)
    else:
        x = patches.reshape(len(patches), *grid, *patch, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(len(patches), -1, grid[0] * patch[0], grid[1] * patch[1])  # from [B, C, rows, ph, columns, pw]


def normalize_patches(target: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, P] -> (normalised [B, N, P], mean [B, N, 1], std [B, N, 1]), with normalised * std + mean the target again.

    Each patch by its own mean and sqrt(unbiased variance + eps) (He et al. 2022, section 4.1; official code).
    """
    mean = target.mean(dim=-1, keepdim=True)
    std = torch.sqrt(target.var(dim=-1, keepdim=True, unbiased=True) + eps)
    return (target - mean) / std, mean, std


def masked_mse(pred: Tensor, target: Tensor, mask: Tensor, *, each: bool = False) -> Tensor:
    """Scalar: squared error, mean over the numbers of a patch, then over all patches of the batch with ``mask`` [B, N] True.

    pred and target [B, N, P]. ``each``: [B], over the patches of each image instead. Not a number if no patch is masked.
    He et al. 2022, section 3.2 (loss on masked patches only).
    """
    error = (pred - target).square().mean(dim=-1)  # [B, N]
    weight, over = mask.to(error.dtype), -1 if each else None
    return (error * weight).sum(dim=over) / weight.sum(dim=over)
