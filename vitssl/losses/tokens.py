"""Tokens as targets: how far a student's are from a teacher's. D numbers in a token."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from vitssl.losses.precision import full_precision
from vitssl.losses.regression import smooth_l1


@full_precision
def token_distance(tokens: Tensor, teacher: Tensor, *, kind: Literal["cosine", "smooth_l1"]) -> Tensor:
    """Scalar, mean over all tokens [..., D]: 1 - cosine, or smooth L1 (beta 1) as a mean over their numbers too.

    The teacher's tokens [..., D] get no gradient and are normalised to mean 0 and deviation 1 over their numbers, without
    weights, so that no few large numbers rule (data2vec, Baevski et al. 2022, section 3.3).
    """
    target = F.layer_norm(teacher.detach(), teacher.shape[-1:], eps=1e-6)
    if kind == "cosine":
        return (1 - F.cosine_similarity(tokens, target, dim=-1)).mean()
    return smooth_l1(tokens, target)
