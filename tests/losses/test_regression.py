"""Absolute and smooth errors, number by number."""

import pytest
import torch

from vitssl.losses.regression import masked_l1, smooth_l1


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_masked_l1_by_a_slow_oracle(eps: float):
    pred, target, mask = numbers(3, 4, 5), numbers(3, 4, 5, seed=1), numbers(3, 4) > 0
    errors = [abs(pred[b, n, p] - target[b, n, p]) for b in range(3) for n in range(4) if mask[b, n] for p in range(5)]
    torch.testing.assert_close(masked_l1(pred, target, mask, eps=eps), sum(errors) / (len(errors) + eps))


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_smooth_l1_by_a_slow_oracle(beta: float):
    pred, target = 2 * numbers(4, 5), numbers(4, 5, seed=1)
    errors = [abs(float(error)) for error in (pred - target).flatten()]
    each = [error**2 / (2 * beta) if error < beta else error - beta / 2 for error in errors]
    assert any(error < beta for error in errors) and any(error > beta for error in errors)
    assert smooth_l1(pred, target, beta=beta).item() == pytest.approx(sum(each) / 20, rel=1e-12)


def test_both_are_taken_in_full_precision():
    pred, target = numbers(2, 3, 4).bfloat16(), numbers(2, 3, 4, seed=1).bfloat16()
    assert masked_l1(pred, target, torch.ones(2, 3, dtype=torch.bool)).dtype == torch.float32
    assert smooth_l1(pred, target).dtype == torch.float32
