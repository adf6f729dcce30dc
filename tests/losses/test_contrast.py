"""Contrast by slow oracles: who stands in a denominator, and which gradient flows."""

import math

import pytest
import torch
from torch import Tensor

from vitssl.losses.contrast import info_nce, nt_xent


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def rows(num: int, seed: int) -> Tensor:
    return torch.randn(num, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("own", [[0, 1, 2], [1, 3, 5]])
def test_nt_xent_by_a_slow_oracle(own: list[int], temperature: float):
    """``own``: this process's rows among the six of all, as one process with three and as the second of two has them."""
    first, second = rows(6, 0), rows(6, 1)
    views = [*first, *second]
    losses = []
    for anchor in own + [index + 6 for index in own]:
        scores = {i: math.exp(cosine(views[anchor], views[i]) / temperature) for i in range(12) if i != anchor}
        losses.append(-math.log(scores[(anchor + 6) % 12] / sum(scores.values())))
    found = nt_xent(first[own], second[own], first, second, torch.tensor(own), temperature=temperature)
    assert float(found) == pytest.approx(sum(losses) / len(losses), rel=1e-12)


@pytest.mark.parametrize("scaled, factor", [(True, 0.4), (False, 1.0)])
def test_info_nce_by_a_slow_oracle(scaled: bool, factor: float):
    queries, keys, own, losses = rows(3, 0), rows(6, 1), [1, 3, 5], []
    for query, partner in zip(queries, own):
        scores = [math.exp(cosine(query, key) / 0.2) for key in keys]
        losses.append(-math.log(scores[partner] / sum(scores)))
    found = info_nce(queries, keys, torch.tensor(own), temperature=0.2, scaled=scaled)
    assert float(found) == pytest.approx(factor * sum(losses) / 3, rel=1e-12)


def test_keys_get_no_gradient():
    queries, keys = rows(3, 0).requires_grad_(), rows(3, 1).requires_grad_()
    info_nce(queries, keys, torch.arange(3), temperature=0.2).backward()
    assert queries.grad.abs().max() > 0 and keys.grad is None
