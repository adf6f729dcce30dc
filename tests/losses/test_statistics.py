"""Statistics as losses, by slow oracles: loops over pairs of numbers, complex exponentials, the whole integral."""

import cmath
import itertools
import math
import statistics

import pytest
import torch
from torch import Tensor

from vitssl.losses.statistics import covariance_penalty, cross_correlation, sigreg, variance_hinge

SHAPES = pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])  # rows fewer than numbers, and more: two ways to one sum


def rows(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    scale = torch.linspace(0.3, 1.7, shape[-1], dtype=torch.float64)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale + 0.4


@SHAPES
def test_variance_by_a_slow_oracle(shape: tuple[int, int]):
    given = rows(shape)
    below = [max(0.0, 1 - math.sqrt(statistics.variance(column.tolist()) + 1e-4)) for column in given.T]
    assert 0 < sum(value > 0 for value in below) < len(below), "some are above 1 and some below"
    assert float(variance_hinge(given)) == pytest.approx(sum(below) / shape[1], rel=1e-12)


@SHAPES
def test_covariance_by_a_slow_oracle(shape: tuple[int, int]):
    given = rows(shape)
    columns = [column.tolist() for column in given.T]
    pairs = [(a, b) for i, a in enumerate(columns) for j, b in enumerate(columns) if i != j]
    expected = sum(statistics.covariance(a, b) ** 2 for a, b in pairs) / shape[1]
    assert float(covariance_penalty(given)) == pytest.approx(expected, rel=1e-12)


@SHAPES
def test_cross_correlation_by_a_slow_oracle(shape: tuple[int, int]):
    first, second = rows(shape, 0), rows(shape, 1)
    expected = 0.0
    for i in range(shape[1]):
        for j in range(shape[1]):
            c = sum(float(a * b) for a, b in zip(first[:, i], second[:, j])) / shape[0]
            expected += (c - 1) ** 2 if i == j else 0.3 * c**2
    assert float(cross_correlation(first, second, redundancy=0.3)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", [covariance_penalty, lambda x: cross_correlation(x, x.roll(1, 0), redundancy=0.3)])
@SHAPES
def test_the_gradient_of_both_ways(shape: tuple[int, int], loss):
    torch.autograd.gradcheck(loss, rows(shape).requires_grad_())


@pytest.mark.parametrize("reach, knots", [(3.0, 17), (4.0, 5)])
def test_sigreg_by_a_slow_oracle(reach: float, knots: int):
    """The trapezoidal rule over [-reach, reach], at each knot and its mirror image."""
    views, directions = rows((2, 6, 3)), torch.nn.functional.normalize(rows((3, 4), 1), dim=0)
    points = [reach * k / (knots - 1) for k in range(-(knots - 1), knots)]
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for v, view in enumerate(views):
        for k, direction in enumerate(directions.T):
            heights = []
            for t in points:
                empirical = sum(cmath.exp(1j * t * float(row @ direction)) for row in view) / 6
                normal = math.exp(-(t**2) / 2)
                heights.append(abs(empirical - normal) ** 2 * normal)
            between = [(a + b) / 2 for a, b in itertools.pairwise(heights)]
            expected[v, k] = 6 * sum(between) * reach / (knots - 1)
    torch.testing.assert_close(sigreg(views, directions, reach=reach, knots=knots), expected, rtol=1e-12, atol=0)


def test_sigreg_grows_with_the_batch_for_what_is_not_normal_alone():
    """Its expectation for standard normal rows is the same for 50 and for 800; collapsed rows are 16 times as far away."""
    directions = torch.eye(40)
    drawn = [torch.randn(5, num, 40, generator=torch.Generator().manual_seed(0)) for num in (50, 800)]
    normal = [sigreg(rows, directions).mean() for rows in drawn]
    collapsed = [sigreg(torch.ones(1, num, 40), directions).mean() for num in (50, 800)]
    assert float(normal[1] / normal[0]) == pytest.approx(1, abs=0.25)
    assert float(collapsed[1] / collapsed[0]) == pytest.approx(16, rel=1e-4)
    assert collapsed[0] > 10 * normal[0]


def test_sigreg_keeps_projections_alone_for_the_backward_pass():
    """Not the 17 times as many numbers that its knots make of them."""
    views, kept = torch.randn(2, 64, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        sigreg(views, torch.eye(8)).mean().backward()
    largest = {each.data_ptr(): each.numel() for each in kept}
    assert sum(largest.values()) < 4 * views.numel()
