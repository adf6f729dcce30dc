"""Statistics of a batch as losses: what keeps embeddings apart where nothing is contrasted.

Legend of shapes: B rows of this process, A rows of all, D numbers in a row, V views, K directions, T knots.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vitssl.losses.precision import full_precision


@full_precision
def variance_hinge(rows: Tensor, *, eps: float = 1e-4) -> Tensor:
    """Scalar: how far the deviation of each number over rows [A, D] is below 1, mean over D.

    The deviation is sqrt(unbiased variance + eps). VICReg (Bardes et al. 2022, equations 1 and 2).
    """
    return torch.relu(1 - torch.sqrt(_variance(rows) + eps)).mean()


@full_precision
def covariance_penalty(rows: Tensor) -> Tensor:
    """Scalar: squared covariances of different numbers over rows [A, D], summed and divided by D (of D x D, not by those).

    VICReg (Bardes et al. 2022, equations 3 and 4).
    """
    centred = rows - rows.mean(dim=0)
    squares = _sum_of_squares(centred, centred) / max(1, len(rows) - 1) ** 2
    return (squares - _variance(rows).square().sum()) / rows.shape[1]


@full_precision
def cross_correlation(first: Tensor, second: Tensor, *, redundancy: float) -> Tensor:
    """Scalar: squared distance of two views' correlations [D, D] from the identity, off the diagonal times ``redundancy``.

    first, second [A, D]: each number of mean 0 and variance 1 over the rows, as a BatchNorm gives them. Summed, not divided
    by anything. Barlow Twins (Zbontar et al. 2021, equation 1).
    """
    same = (first * second).mean(dim=0)  # the diagonal
    others = _sum_of_squares(first, second) / len(first) ** 2 - same.square().sum()
    return (same - 1).square().sum() + redundancy * others


@full_precision
def sigreg(
    views: Tensor,
    directions: Tensor,
    *,
    reach: float = 3.0,
    knots: int = 17,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    """[V, K]: how far the rows of each view are from a standard normal distribution along each direction.

    views [V, B, D], directions [D, K] of length 1; ``total`` sums over processes, with gradient. Epps and Pulley's statistic
    (1983): A x the integral of |empirical - normal characteristic function|^2 exp(-t^2 / 2), by the trapezoidal rule at
    ``knots`` points from 0 to ``reach``, twice, for it is even. Times A, so for normal rows its size is the same at every A,
    and for all others grows. SIGReg (Balestriero and LeCun 2025) is its mean.

    Memory is that of the projections [V, B, K]: what a knot makes of them is computed again in the backward pass.
    """
    projected = views @ directions.to(views.dtype)  # [V, B, K]
    points = torch.linspace(0, reach, knots, dtype=views.dtype).tolist()
    waves = [checkpoint(_wave, projected, t, use_reentrant=False, preserve_rng_state=False) for t in points]
    sums = total(torch.stack(waves))  # [T, 2, V, K]
    count = sums[0, 0]  # at t = 0 every row counts 1
    real, imaginary = (sums / count).unbind(dim=1)  # [T, V, K]
    normal = torch.exp(-torch.linspace(0, reach, knots, dtype=views.dtype, device=views.device).square() / 2)[:, None, None]
    error = (real - normal).square() + imaginary.square()
    return 2 * count * torch.trapezoid(error * normal, dx=reach / (knots - 1), dim=0)


def _variance(rows: Tensor) -> Tensor:
    """[D]: unbiased, and 0 of a single row, which an evaluation may come down to."""
    return (rows - rows.mean(dim=0)).square().sum(dim=0) / max(1, len(rows) - 1)


def _wave(projected: Tensor, t: float) -> Tensor:
    """[V, B, K] -> [2, V, K]: cosines and sines of t x, summed over rows."""
    angles = t * projected
    return torch.stack([angles.cos().sum(dim=-2), angles.sin().sum(dim=-2)])


def _sum_of_squares(first: Tensor, second: Tensor) -> Tensor:
    """Scalar: of all entries of first.T @ second [D, D]; where rows are fewer than D, by way of [A, A], which is the same.

    At 2048 rows of 8192 numbers that is a sixteenth of the memory and half of the arithmetic.
    """
    if len(first) < first.shape[1]:
        return ((first @ first.T) * (second @ second.T)).sum()
    return (first.T @ second).square().sum()
