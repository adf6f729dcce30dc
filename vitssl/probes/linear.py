"""A linear probe in closed form: ridge regression of one-hot labels on standardised features."""

import torch
from torch import Tensor


def ridge_accuracy(features: Tensor, labels: Tensor, queries: Tensor, answers: Tensor, *, strength: float = 1e-4) -> float:
    """Top-1 accuracy in [0, 1] on ``queries`` [Q, D] of the ridge classifier fitted to ``features`` [N, D], ``labels`` [N].

    Features are standardised by the mean and deviation of the bank; targets are one-hot and centred; the penalty is
    ``strength`` x N on the squared weights, none on the intercept. Solved in float64, over features or samples, whichever are
    fewer (the two forms are equal: (X'X + a)^-1 X' = X' (XX' + a)^-1).
    """
    num_classes = int(torch.maximum(labels.max(), answers.max())) + 1
    mean, std = features.double().mean(dim=0), features.double().std(dim=0).clamp(min=1e-6)
    x, y = (features.double() - mean) / std, torch.eye(num_classes, dtype=torch.float64, device=labels.device)[labels]
    penalty = strength * len(x) * torch.eye(min(x.shape), dtype=torch.float64, device=x.device)
    if x.shape[1] <= len(x):
        weights = torch.linalg.solve(x.T @ x + penalty, x.T @ (y - y.mean(dim=0)))  # [D, C]
    else:
        weights = x.T @ torch.linalg.solve(x @ x.T + penalty, y - y.mean(dim=0))  # [D, C]
    scores = ((queries.double() - mean) / std) @ weights + y.mean(dim=0)
    return (scores.argmax(dim=1) == answers).double().mean().item()
