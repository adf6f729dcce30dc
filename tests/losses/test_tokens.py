"""Distances between tokens, against slow oracles."""

import math

import pytest
import torch

from vitssl.losses.tokens import token_distance


@pytest.mark.parametrize("kind", ["cosine", "smooth_l1"])
def test_by_a_slow_oracle(kind: str):
    tokens, teacher = torch.randn(2, 3, 5, dtype=torch.float64) * 2, torch.randn(2, 3, 5, dtype=torch.float64) * 7 + 3
    rows = []
    for own, other in zip(tokens.reshape(6, 5).tolist(), teacher.reshape(6, 5).tolist()):
        mean = sum(other) / 5
        deviation = math.sqrt(sum((x - mean) ** 2 for x in other) / 5 + 1e-6)
        target = [(x - mean) / deviation for x in other]
        if kind == "cosine":
            length = math.sqrt(sum(x * x for x in own) * sum(x * x for x in target))
            rows.append(1 - sum(x * y for x, y in zip(own, target)) / length)
        else:
            apart = [abs(x - y) for x, y in zip(own, target)]
            rows.append(sum(d * d / 2 if d < 1 else d - 0.5 for d in apart) / 5)
    assert token_distance(tokens, teacher, kind=kind).item() == pytest.approx(sum(rows) / 6, rel=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "smooth_l1"])
def test_the_teacher_gets_no_gradient_and_bf16_is_widened(kind: str):
    tokens, teacher = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    token_distance(tokens, teacher, kind=kind).backward()
    assert tokens.grad.any() and teacher.grad is None
    assert token_distance(tokens.bfloat16(), teacher, kind=kind).dtype == torch.float32
