"""The closed-form linear probe against numpy's least squares on the augmented problem."""

import numpy as np
import pytest
import torch

from vitssl.probes.linear import ridge_accuracy


def slow_accuracy(features, labels, queries, answers, *, strength: float) -> float:
    """Ridge by ``numpy.linalg.lstsq``: rows sqrt(strength N) e_d stand under the data, a free column is the intercept."""
    bank, mean, std = features.double().numpy(), features.double().mean(0).numpy(), features.double().std(0).numpy()
    x = (bank - mean) / np.maximum(std, 1e-6)
    targets = np.eye(int(max(labels.max(), answers.max())) + 1)[labels.numpy()]
    penalty = np.sqrt(strength * len(x)) * np.eye(x.shape[1])
    rows = np.block([[x, np.ones((len(x), 1))], [penalty, np.zeros((x.shape[1], 1))]])
    weights, *_ = np.linalg.lstsq(rows, np.vstack([targets, np.zeros((x.shape[1], targets.shape[1]))]), rcond=None)
    z = (queries.double().numpy() - mean) / np.maximum(std, 1e-6)
    return float((np.hstack([z, np.ones((len(z), 1))]) @ weights).argmax(1).__eq__(answers.numpy()).mean())


def clusters(num: int, dim: int, *, classes: int, seed: int, spread: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [num, dim] on unequal scales and with an offset, labels [num], unequally many."""
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (num,), generator=generator) * torch.randint(2, (num,), generator=generator)
    rows = centres[labels] + spread * torch.randn(num, dim, generator=generator)
    return rows * torch.logspace(-2, 2, dim) + 7, labels


@pytest.mark.parametrize("strength", [1e-4, 1e-2, 3.0])
@pytest.mark.parametrize("num, dim, classes", [(300, 12, 5), (20, 40, 3)])
def test_the_slow_oracle(num: int, dim: int, classes: int, strength: float):
    bank, queries = clusters(num, dim, classes=classes, seed=1), clusters(400, dim, classes=classes, seed=2)
    found = ridge_accuracy(*bank, *queries, strength=strength)
    assert found == pytest.approx(slow_accuracy(*bank, *queries, strength=strength), abs=1e-12)
    assert 0.3 < found < 1.0  # neither trivial nor hopeless, so a wrong solution would show


def test_scale_and_offset_of_features_do_not_matter():
    bank, queries = clusters(200, 8, classes=4, seed=1), clusters(300, 8, classes=4, seed=2)
    scale, offset = torch.logspace(-3, 3, 8, dtype=torch.float64), torch.arange(8, dtype=torch.float64)
    moved = [(features.double() * scale + offset, labels) for features, labels in (bank, queries)]
    assert ridge_accuracy(*moved[0], *moved[1]) == pytest.approx(ridge_accuracy(*bank, *queries), abs=1 / 300)


def test_a_constant_feature_is_harmless():
    bank, queries = clusters(200, 8, classes=4, seed=1), clusters(300, 8, classes=4, seed=2)
    wider = [(torch.cat([features, torch.ones(len(features), 1)], dim=1), labels) for features, labels in (bank, queries)]
    assert ridge_accuracy(*wider[0], *wider[1]) == ridge_accuracy(*bank, *queries)


def test_a_strong_penalty_leaves_the_commonest_class():
    bank, queries = clusters(200, 8, classes=4, seed=1), clusters(300, 8, classes=4, seed=2)
    share = (queries[1] == bank[1].bincount().argmax()).double().mean().item()
    assert ridge_accuracy(*bank, *queries, strength=1e9) == pytest.approx(share)


def test_more_features_than_samples_cost_no_square_of_the_features():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(2, 100_000, generator=generator)
    labels, answers = (torch.arange(n) % 2 for n in (20, 30))
    bank, queries = (centres[rows] + torch.randn(len(rows), 100_000, generator=generator) for rows in (labels, answers))
    assert ridge_accuracy(bank, labels, queries, answers) == 1.0  # 80 GB by the other form
