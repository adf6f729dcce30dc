"""How alike two sets of features of the same images are: linear CKA (Kornblith et al. 2019), without its bias.

Surprising: the plain estimate of few images in wide features is near 1 whatever they are (of 512 images and 768 unrelated
features: about 0.6), so the unbiased one of HSIC (Song et al. 2012) stands in its three places; it may fall below 0.
"""

from torch import Tensor


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Debiased linear CKA of features [N, D] and [N, E] of the same N images; 1 where they differ by a rotation and a scale.

    Needs no N x N matrix: with K = XX' and its diagonal set to zero, every sum over K is one over X'Y or X'1. NaN for fewer
    than four images and for features that are all alike.
    """
    if len(x) < 4:
        return float("nan")
    x, y = (_scaled(each.double()) for each in (x, y))
    own = _hsic(x, x) * _hsic(y, y)
    return (_hsic(x, y) / own.sqrt()).item() if own > 0 else float("nan")


def _scaled(features: Tensor) -> Tensor:
    """Centred, and of a size near 1: neither changes the ratio."""
    centred = features - features.mean(dim=0)
    return centred / centred.square().mean().sqrt().clamp(min=1e-300)


def _hsic(x: Tensor, y: Tensor) -> Tensor:
    """Song et al. 2012, eq. 5, of linear kernels, times n (n - 3); ``x`` and ``y`` centred, in float64."""
    n, (k, l) = len(x), (each.square().sum(dim=1) for each in (x, y))  # the diagonals [N]
    rows = [each @ each.sum(dim=0) - diagonal for each, diagonal in ((x, k), (y, l))]  # sums of the rows without them
    trace = (x.T @ y).square().sum() - k @ l
    return trace + rows[0].sum() * rows[1].sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows[0] @ rows[1]
