"""Agreement by slow oracles, and which way gradient goes."""

import pytest
import torch

from vitssl.losses.agreement import cosine_distance, squared_distance


def test_cosine_distance_by_a_slow_oracle():
    """The squared distance of two directions."""
    predictions, targets = torch.randn(2, 5, 3, dtype=torch.float64).unbind()
    expected = [sum((p / p.norm() - t / t.norm()) ** 2) for p, t in zip(predictions, targets)]
    assert float(cosine_distance(predictions, targets)) == pytest.approx(float(sum(expected)) / 5, rel=1e-12)
    assert float(cosine_distance(predictions, 3 * predictions)) == pytest.approx(0, abs=1e-12)
    assert float(cosine_distance(predictions, -predictions)) == pytest.approx(4, rel=1e-12)


def test_targets_of_the_cosine_get_no_gradient_and_both_of_the_square_do():
    first, second = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    cosine_distance(first, second).backward()
    assert first.grad.abs().max() > 0 and second.grad is None
    squared_distance(first, second).backward()
    assert second.grad.abs().max() > 0


def test_squared_distance_by_a_slow_oracle():
    views, centre = torch.randn(3, 4, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    squares = [float(views[v, b, d] - centre[b, d]) ** 2 for v in range(3) for b in range(4) for d in range(2)]
    assert float(squared_distance(views, centre)) == pytest.approx(sum(squares) / 24, rel=1e-12)
