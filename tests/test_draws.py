"""Draws: the bits never change, they look random, and nothing but (seed, purpose, position) decides them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitssl.draws import fold, hashed, normal, permutation, uniform
from vitssl.views import View, purpose

MASK = (1 << 64) - 1
KNOWN_BITS = [
    [3329812285863724956, -4024364840042239724],
    [2046363599059009692, -6308626636072540165],
    [-5780424987045804709, 9068790906319012537],
]
KNOWN_PERMUTATION = [1, 4, 3, 0, 7, 5, 6, 2]
KNOWN_FOLD = 6756023988025203381
KNOWN_PURPOSE = 5882019632935571528
KNOWN_VIEW = 7787403722320473940


def mix(x: int) -> int:
    """SplitMix64's finaliser on unsigned Python integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def slow_hash(seed: int, about: int, position: int, index: int) -> int:
    key = mix(mix((seed * 0x9E3779B97F4A7C15 + about) & MASK) ^ (position & MASK))
    return mix(mix((key + (index + 1) * 0x9E3779B97F4A7C15) & MASK) ^ key)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), about=st.integers(0, 2**63 - 1), position=st.integers(0, 2**62), num=st.integers(1, 6))
def test_hashes_by_a_slow_oracle(seed: int, about: int, position: int, num: int):
    fast = hashed(seed, about, torch.tensor([position]), num)[0].tolist()
    assert [value & MASK for value in fast] == [slow_hash(seed, about, position, index) for index in range(num)]


def test_known_bits():
    """Runs of the past must be repeatable: a change here is a change of every run."""
    bits = hashed(7, purpose("mae.mask"), torch.tensor([0, 1, 10**12]), 2)
    assert bits.tolist() == KNOWN_BITS
    assert permutation(7, 3, 8).tolist() == KNOWN_PERMUTATION
    assert fold(1, 2, 3) == KNOWN_FOLD
    assert purpose("mae.mask") == KNOWN_PURPOSE
    assert View(size=(224, 224), scale=(0.2, 1.0), flip=0.5).purpose == KNOWN_VIEW


def test_uniform_is_uniform_and_uncorrelated():
    values = uniform(0, 1, torch.arange(2000), 50)
    assert values.dtype == torch.float64
    assert values.min() >= 0 and values.max() < 1
    counts = torch.histc(values, bins=100, min=0, max=1)
    chi2 = ((counts - 1000).square() / 1000).sum().item()
    assert 99 - 5 * 14.1 < chi2 < 99 + 5 * 14.1  # mean 99, deviation sqrt(198)
    centred = values - 0.5
    for pair in (
        (centred[:, :-1], centred[:, 1:]),  # neighbours of a row
        (centred[:-1], centred[1:]),  # neighbouring positions
        (centred, uniform(1, 1, torch.arange(2000), 50) - 0.5),  # neighbouring seeds
        (centred, uniform(0, 2, torch.arange(2000), 50) - 0.5),  # neighbouring purposes
    ):
        correlation = (pair[0] * pair[1]).mean().item() * 12
        assert abs(correlation) < 5 / pair[0].numel() ** 0.5


def test_a_sample_s_numbers_do_not_depend_on_its_company():
    together = uniform(3, 9, torch.tensor([5, 1000, 7]), 6)
    for row, position in enumerate((5, 1000, 7)):
        assert torch.equal(uniform(3, 9, torch.tensor([position]), 6)[0], together[row])
    assert torch.equal(uniform(3, 9, torch.tensor([5]), 4)[0], together[0, :4])  # nor on how many are drawn


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**40), about=st.integers(0, 2**62), size=st.integers(0, 300))
def test_a_permutation_is_one(seed: int, about: int, size: int):
    assert sorted(permutation(seed, about, size).tolist()) == list(range(size))


def test_permutations_differ_by_seed_and_purpose():
    orders = {tuple(permutation(seed, about, 20).tolist()) for seed in range(5) for about in range(5)}
    assert len(orders) == 25


def test_fold_depends_on_every_number_and_their_order():
    values = {fold(), fold(0), fold(0, 0), fold(1), fold(1, 0), fold(0, 1), fold(-1), fold(2**63)}
    assert len(values) == 8
    assert all(0 <= value < 2**63 for value in values)


def test_normal_numbers_by_their_formula_and_their_moments():
    drawn = uniform(3, 9, torch.arange(500), 40)
    found = normal(drawn)
    assert found.shape == (500, 40) and found.isfinite().all()
    u, v = drawn[7, 4].item(), drawn[7, 24].item()
    assert found[7, 4].item() == pytest.approx((-2 * math.log(1 - u)) ** 0.5 * math.cos(2 * math.pi * v), abs=1e-5)
    assert found[7, 24].item() == pytest.approx((-2 * math.log(1 - u)) ** 0.5 * math.sin(2 * math.pi * v), abs=1e-5)
    assert abs(found.mean().item()) < 0.03 and found.square().mean().item() == pytest.approx(1, abs=0.04)
    assert found.pow(4).mean().item() == pytest.approx(3, abs=0.3)
    assert normal(torch.zeros(1, 2, dtype=torch.float64)).tolist() == [[0.0, 0.0]]
    assert normal(torch.full((1, 2), 1 - 2.0**-53, dtype=torch.float64)).isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_draws_the_same_bits():
    positions = torch.arange(1000)
    assert torch.equal(uniform(3, 9, positions.cuda(), 17).cpu(), uniform(3, 9, positions, 17))
