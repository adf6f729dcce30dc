"""Linear CKA against its definition by Gram matrices, its invariances, and what it says of features that share nothing."""

import math

import pytest
import torch

from vitssl.probes.similarity import linear_cka


def draw(num: int, width: int, *, seed: int) -> torch.Tensor:
    return torch.randn(num, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 3


def slow_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """U-centred Gram matrices (Szekely and Rizzo 2014), whose mean product is Song's unbiased HSIC."""

    def centred(features: torch.Tensor) -> torch.Tensor:
        gram, n = features @ features.T, len(features)
        gram.fill_diagonal_(0)
        rows = gram.sum(dim=1) / (n - 2)
        gram = gram - rows[:, None] - rows[None] + gram.sum() / ((n - 1) * (n - 2))
        return gram.fill_diagonal_(0)

    k, l = centred(x), centred(y)
    return ((k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt()).item()


def biased_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Kornblith et al. 2019, eq. 4, by HSIC with centred Gram matrices."""
    centre = torch.eye(len(x), dtype=torch.float64) - 1 / len(x)
    k, l = (centre @ each @ each.T @ centre for each in (x, y))
    return ((k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt()).item()


@pytest.mark.parametrize(("num", "width", "other"), [(4, 2, 3), (12, 40, 5), (60, 7, 7), (200, 16, 30)])
def test_the_slow_oracle(num: int, width: int, other: int) -> None:
    x = draw(num, width, seed=0)
    y = 0.7 * x @ draw(width, other, seed=1) + draw(num, other, seed=2)
    assert linear_cka(x, y) == pytest.approx(slow_cka(x, y), rel=1e-9, abs=1e-12)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x), rel=1e-9)


def test_of_many_images_it_is_kornbliths() -> None:
    x = draw(3000, 4, seed=0)
    y = x @ draw(4, 3, seed=1) + draw(3000, 3, seed=2)
    assert linear_cka(x, y) == pytest.approx(biased_cka(x, y), abs=2e-3)


def test_rotation_scale_and_shift_do_not_matter_but_other_maps_do() -> None:
    x, y = draw(50, 8, seed=0), draw(50, 8, seed=0) + draw(50, 8, seed=1)
    turn, _ = torch.linalg.qr(draw(8, 8, seed=2))
    assert linear_cka(x, x) == pytest.approx(1, abs=1e-12)
    assert linear_cka(x, 1e6 * x @ turn - 5) == pytest.approx(1, abs=1e-9)
    assert linear_cka(1e-9 * x @ turn + 1, y) == pytest.approx(linear_cka(x, y), rel=1e-6)
    assert linear_cka(x * torch.logspace(0, 2, 8), x) < 0.9
    assert linear_cka(x.float(), x.float()) == pytest.approx(1, abs=1e-12)


def test_what_has_nothing_in_common_is_near_zero_though_features_are_wide() -> None:
    x, y = draw(100, 300, seed=0), draw(100, 300, seed=1)
    assert abs(linear_cka(x, y)) < 0.05 < 0.6 < biased_cka(x, y)


@pytest.mark.parametrize("features", [torch.randn(3, 5), torch.ones(9, 5)], ids=["three images", "all alike"])
def test_where_it_says_nothing(features: torch.Tensor) -> None:
    assert math.isnan(linear_cka(features, features))
