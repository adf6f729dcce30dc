"""How many directions features use: RankMe and alpha-ReQ, which need no labels."""

import torch
from torch import Tensor


def rankme(features: Tensor, *, eps: float = 1e-7) -> float:
    """Effective rank of features [N, D]: exp of the entropy of their singular values (Garrido et al. 2023, eq. 1).

    They are not centred, and ``eps`` is added to each share after normalising, without normalising again, as in the paper.
    """
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum() + eps
    return torch.exp(-(shares * shares.log()).sum()).item()


def alpha_req(features: Tensor, *, floor: float = 1e-12) -> float:
    """Decay exponent of the spectrum of features [N, D] (Agrawal et al. 2022): eigenvalue i of their covariance ~ i^-alpha.

    A least-squares line through log eigenvalue over log rank, of all that are above ``floor`` x the largest. The published code
    fits a range chosen by hand, so compare values of this function with each other alone. NaN for fewer than two eigenvalues.
    """
    centred = features.double() - features.double().mean(dim=0)
    values = torch.linalg.svdvals(centred).square() / len(centred)
    values = values[values > floor * values[0]]
    if len(values) < 2:
        return float("nan")
    x, y = torch.arange(1, len(values) + 1, device=values.device).double().log(), values.log()
    x = x - x.mean()
    return -(x @ (y - y.mean()) / (x @ x)).item()
