"""Agreement: how far a prediction is from what it is to be, where something else keeps all of them from being one."""

import torch.nn.functional as F
from torch import Tensor

from vitssl.losses.precision import full_precision


@full_precision
def cosine_distance(predictions: Tensor, targets: Tensor) -> Tensor:
    """Scalar in [0, 4]: 2 - 2 x the cosine of each row and its target, mean over rows [B, D]; no gradient reaches targets.

    The squared distance of the two on the sphere. BYOL (Grill et al. 2020, equation 2).
    """
    return 2 - 2 * F.cosine_similarity(predictions, targets.detach(), dim=-1).mean()


@full_precision
def squared_distance(rows: Tensor, others: Tensor) -> Tensor:
    """Scalar: squared difference, mean over all numbers of both [..., D], which may be broadcast; gradient reaches both."""
    return (rows - others).square().mean()
