"""How many directions features use: RankMe, LiDAR, alpha-ReQ and their spread, which need no labels."""

import torch
from torch import Tensor


def rankme(features: Tensor, *, eps: float = 1e-7) -> float:
    """Effective rank of features [N, D]: exp of the entropy of their singular values (Garrido et al. 2023, eq. 1).

    They are not centred, and ``eps`` is added to each share after normalising, without normalising again, as in the paper.
    """
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum() + eps
    return torch.exp(-(shares * shares.log()).sum()).item()


def lidar(features: Tensor, *, delta: float = 1e-4) -> float:
    """Effective rank of what tells images apart, beside what tells views of one image apart (Thilak et al. 2024, LiDAR).

    features [N, V, D]: V views of N images. exp of the entropy of the eigenvalues of Sw^-1/2 Sb Sw^-1/2, where Sb is the
    covariance of the images' means and Sw that of the views about them, plus ``delta`` on its diagonal (equations 2 to 4).
    """
    features = features.double()
    means = features.mean(dim=1)
    between = (means - means.mean(dim=0)).T @ (means - means.mean(dim=0)) / max(1, len(means) - 1)
    apart = (features - means[:, None]).flatten(0, 1)
    within = apart.T @ apart / max(1, len(means) * (features.shape[1] - 1))
    values, vectors = torch.linalg.eigh(within)
    whiten = vectors * (values.clamp(min=0) + delta).rsqrt() @ vectors.T
    values = torch.linalg.eigvalsh(whiten @ between @ whiten).clamp(min=0)
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return torch.exp(-torch.xlogy(shares, shares).sum()).item()


def spread(features: Tensor) -> float:
    """Standard deviation of L2-normalised features [N, D], mean over dimensions, times sqrt(D): 1 is even, 0 a collapse.

    As watched in SimSiam (Chen and He 2021, figure 2).
    """
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    return (unit.std(dim=0).mean() * unit.shape[1] ** 0.5).item()


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
