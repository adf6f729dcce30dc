"""How far predicted numbers are from their targets, where the square would listen to outliers too much."""

import torch.nn.functional as F
from torch import Tensor

from vitssl.losses.precision import full_precision


@full_precision
def masked_l1(pred: Tensor, target: Tensor, mask: Tensor, *, eps: float = 0.0) -> Tensor:
    """Scalar: absolute error, mean over the numbers of all patches of the batch with ``mask`` [B, N] True.

    pred and target [B, N, P]. Xie et al. 2022, section 3.4. ``eps`` is added to the count of numbers: SimMIM's official code
    has 1e-5 per channel there, which would make a mean over parts of a batch differ from that over the whole.
    """
    weight = mask[..., None].to(pred.dtype)
    return ((pred - target).abs() * weight).sum() / (weight.sum() * pred.shape[-1] + eps)


@full_precision
def smooth_l1(pred: Tensor, target: Tensor, *, beta: float = 1.0) -> Tensor:
    """Scalar, mean over all numbers: error^2 / (2 beta) below ``beta``, |error| - beta / 2 above (Girshick 2015, equation 3).

    I-JEPA: beta 1; data2vec (Baevski et al. 2022, equation 2): 2 for images.
    """
    return F.smooth_l1_loss(pred, target, beta=beta)
