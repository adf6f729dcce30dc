"""Few-shot classification by least squares, as big_vision judges encoders (``evaluators/fewshot_lsr.py``).

Surprising: features are whitened by the statistics of the few training samples alone, the bias is a constant feature of 100 and
so penalised like the others, and the penalty is not scaled by the number of samples.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

L2 = 2.0**10
_BIAS, _EPS = 100.0, 1e-5


def choose_shots(labels: NDArray[np.int64], *, shots: int, seed: int) -> NDArray[np.int64]:
    """Indices of ``shots`` samples of each class of ``labels`` [N], class by class; of smaller classes all there are.

    One permutation per class, in the order of the classes, of numpy's generator with this seed.
    """
    draw = np.random.default_rng(seed)
    of_class = (np.flatnonzero(labels == label) for label in np.unique(labels))
    return np.concatenate([each[draw.permutation(len(each))[:shots]] for each in of_class])


def least_squares(features: Tensor, labels: Tensor, *, num_classes: int, l2: float = L2) -> tuple[Tensor, Tensor, Tensor]:
    """(weights [D + 1, C], mean [D], deviation [D]) in float64 of the ridge regression of +-1 targets on [N, D] features.

    Solved over features or samples, whichever are fewer.
    """
    x = features.double()
    mean, deviation = x.mean(dim=0), x.std(dim=0, unbiased=False) + _EPS
    x = _with_bias((x - mean) / deviation)
    targets = 2.0 * torch.nn.functional.one_hot(labels, num_classes).double() - 1
    if len(x) >= x.shape[1]:
        return _inverse(x.T @ x, l2) @ (x.T @ targets), mean, deviation
    return x.T @ (_inverse(x @ x.T, l2) @ targets), mean, deviation


def fewshot_predictions(features: Tensor, labels: Tensor, queries: Tensor, *, num_classes: int, l2: float = L2) -> Tensor:
    """[Q] predicted classes of ``queries`` [Q, D] from few ``features`` [N, D] with ``labels`` [N]."""
    weights, mean, deviation = least_squares(features, labels, num_classes=num_classes, l2=l2)
    return (_with_bias((queries.double() - mean) / deviation) @ weights).argmax(dim=1)


def fewshot_accuracy(
    features: Tensor, labels: Tensor, queries: Tensor, answers: Tensor, *, shots: int, seed: int, l2: float = L2
) -> float:
    """Top-1 accuracy in [0, 1] on ``queries`` of a classifier of ``shots`` samples of each class, chosen by ``seed``."""
    chosen = torch.from_numpy(choose_shots(labels.cpu().numpy(), shots=shots, seed=seed)).to(labels.device)
    num_classes = int(torch.maximum(labels.max(), answers.max())) + 1
    predicted = fewshot_predictions(features[chosen], labels[chosen], queries, num_classes=num_classes, l2=l2)
    return (predicted == answers).double().mean().item()


def _with_bias(features: Tensor) -> Tensor:
    return torch.cat([features, torch.full_like(features[:, :1], _BIAS)], dim=1)


def _inverse(matrix: Tensor, l2: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ ((1 / (values + l2))[:, None] * vectors.T)
