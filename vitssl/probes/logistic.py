"""Multinomial logistic regression by L-BFGS, over a grid of penalties (DINOv2's ``eval/log_regression.py``, scikit-learn)."""

import torch
from torch import Tensor
from torch.nn import functional as F

GRID = tuple(10.0 ** (-6 + 11 * step / 44) for step in range(45))
"""Values of C, the inverse penalty: 45 from 1e-6 to 1e5, evenly in their logarithms."""


def fit_logistic(
    features: Tensor, labels: Tensor, *, num_classes: int, c: float, start: Tensor | None = None, steps: int = 1000
) -> Tensor:
    """[D + 1, C] float64 weights, the last row the intercepts, of features [N, D] with ``labels`` [N].

    Minimises c x (sum of cross entropies) + (sum of squared weights) / 2, no penalty on intercepts, as scikit-learn does;
    ``start`` is another solution to begin from. Stops where no gradient exceeds 1e-4 x c, or after ``steps``.
    """
    x = torch.cat([features.double(), torch.ones_like(features[:, :1], dtype=torch.float64)], dim=1)
    weights = torch.zeros(x.shape[1], num_classes, dtype=torch.float64, device=x.device) if start is None else start.clone()
    weights.requires_grad_(True)
    scale = c * len(x)  # the objective is taken by sample and by c, or its size would differ by eleven orders over the grid
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=steps,
        history_size=10,
        tolerance_grad=1e-4 / len(x),
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weights, labels) + weights[:-1].square().sum() / (2 * scale)
        loss.backward()
        return loss

    optimizer.step(objective)
    return weights.detach()


def logistic_predictions(weights: Tensor, queries: Tensor) -> Tensor:
    """[Q] classes of ``queries`` [Q, D] by weights [D + 1, C]."""
    return (queries.double() @ weights[:-1] + weights[-1]).argmax(dim=1)


def logistic_accuracies(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    answers: Tensor,
    *,
    grid: tuple[float, ...] = GRID,
    steps: int = 1000,
) -> list[float]:
    """Top-1 accuracy in [0, 1] on ``queries`` for each penalty of ``grid``; each fit begins from the one before."""
    num_classes, weights, found = int(torch.maximum(labels.max(), answers.max())) + 1, None, []
    for c in grid:
        weights = fit_logistic(features, labels, num_classes=num_classes, c=c, start=weights, steps=steps)
        found.append((logistic_predictions(weights, queries) == answers).double().mean().item())
    return found
