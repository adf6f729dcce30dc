"""Logistic regression against scikit-learn's, and where the answer is known."""

import numpy as np
import pytest
import torch

from vitssl.probes.logistic import GRID, fit_logistic, logistic_accuracies, logistic_predictions

linear_model = pytest.importorskip("sklearn.linear_model", reason="needs pip install 'vitssl[test]'")


def draw(num: int, *, width: int, classes: int, seed: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (num,), generator=generator)
    return scale * (centres[labels] + torch.randn(num, width, generator=generator)), labels


@pytest.mark.parametrize(
    ("num", "width", "classes", "c", "scale"),
    [(200, 8, 3, 1.0, 1.0), (200, 8, 2, 1e-3, 1.0), (50, 60, 5, 1e2, 1.0), (300, 5, 7, 1e-6, 30.0), (200, 8, 3, 10.0, 0.01)],
)
def test_scikit_learn_finds_the_same(num: int, width: int, classes: int, c: float, scale: float) -> None:
    x, labels = draw(num, width=width, classes=classes, seed=0, scale=scale)
    weights = fit_logistic(x, labels, num_classes=classes, c=c).numpy()
    # Of two classes it penalises one vector, the difference of ours.
    oracle = linear_model.LogisticRegression(C=c * (2 if classes == 2 else 1), tol=1e-10, max_iter=20_000)
    x = x.double()
    oracle.fit(x.numpy(), labels.numpy())
    expected = oracle.predict_proba(x.numpy())
    logits = torch.from_numpy(x.numpy() @ weights[:-1] + weights[-1])
    np.testing.assert_allclose(logits.softmax(dim=1).numpy(), expected, atol=2e-4)


def test_the_grid_is_dinov2s() -> None:
    assert len(GRID) == 45 and GRID[0] == 1e-6 and GRID[-1] == pytest.approx(1e5)
    np.testing.assert_allclose(np.diff(np.log10(GRID)), 0.25)


def test_a_grid_finds_a_penalty() -> None:
    train, test = (draw(num, width=30, classes=4, seed=seed) for num, seed in ((60, 0), (500, 1)))
    found = logistic_accuracies(*train, *test, grid=(1e-8, 1e-2, 1.0))
    alone = [
        (logistic_predictions(fit_logistic(*train, num_classes=4, c=c), test[0]) == test[1]).double().mean().item()
        for c in (1e-2, 1.0)
    ]
    assert found[1:] == pytest.approx(alone, abs=0.006), "where a fit begins does not decide where it ends"
    assert max(found) > 0.9
