"""Losses and their targets, as pure functions. B images, C channels, N patches, P = ph * pw * C numbers in a patch."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """[B, C, H, W] -> [B, N, P]: patches in raster order, numbers in the order (row, column, channel).

    He et al. 2022, official code; SimMIM's head orders (channel, row, column) instead. ``patch`` (ph, pw) divides (H, W).
    """
    batch, channels, height, width = images.shape
    rows, columns = height // patch[0], width // patch[1]
    x = images.reshape(batch, channels, rows, patch[0], columns, patch[1])
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch[0] * patch[1] * channels)


def unpatchify(patches: Tensor, patch: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """[B, N, P] -> [B, C, H, W], the inverse of :func:`patchify`; ``grid`` (rows, columns) with N = rows * columns."""
    x = patches.reshape(len(patches), *grid, *patch, -1)  # [B, rows, columns, ph, pw, C]
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, grid[0] * patch[0], grid[1] * patch[1])


def normalize_patches(target: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, P] -> (normalised [B, N, P], mean [B, N, 1], std [B, N, 1]), with normalised * std + mean the target again.

    Each patch by its own mean and sqrt(unbiased variance + eps) (He et al. 2022, section 4.1; official code).
    """
    mean = target.mean(dim=-1, keepdim=True)
    std = torch.sqrt(target.var(dim=-1, keepdim=True, unbiased=True) + eps)
    return (target - mean) / std, mean, std


def masked_mse(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Scalar: squared error, mean over the numbers of a patch, then over all patches of the batch with ``mask`` [B, N] True.

    pred and target [B, N, P]. Not a number if no patch is masked. He et al. 2022, section 3.2 (loss on masked patches only).
    """
    error = (pred - target).square().mean(dim=-1)  # [B, N]
    weight = mask.to(error.dtype)
    return (error * weight).sum() / weight.sum()


def binary_cross_entropy(logits: Tensor, targets: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Scalar: each class a question of its own, mean over all B x classes numbers, in nats (a zero head: ln 2).

    logits [B, classes]; targets [B] int64, or [B, classes] in [0, 1]. ``smoothing`` s makes them t (1 - s) + s / classes, as
    timm does (Wightman et al. 2021, section 4.1; DeiT III, Touvron et al. 2022).
    """
    hot = F.one_hot(targets, logits.shape[-1]) if targets.ndim == 1 else targets
    hot = hot.to(logits.dtype) * (1 - smoothing) + smoothing / logits.shape[-1]
    return F.binary_cross_entropy_with_logits(logits, hot)


def distillation(logits: Tensor, teacher: Tensor, *, kind: Literal["soft", "hard"], temperature: float = 1.0) -> Tensor:
    """Scalar: how far logits [B, classes] are from a teacher's [B, classes], which get no gradient. In nats.

    ``soft``: KL(teacher || student) at ``temperature``, times its square, mean over all B x classes numbers (not over B: the
    official code of DeiT divides by both). ``hard``: cross entropy with the teacher's first choice. Touvron et al. 2021,
    section 4; weigh it against the loss on labels as (1 - alpha) x base + alpha x this.
    """
    teacher = teacher.detach()
    if kind == "hard":
        return F.cross_entropy(logits, teacher.argmax(dim=-1))
    log_p, log_q = (F.log_softmax(each / temperature, dim=-1) for each in (logits, teacher))
    return F.kl_div(log_p, log_q, reduction="sum", log_target=True) * temperature**2 / logits.numel()
