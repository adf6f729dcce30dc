"""Corrupted patches: one by one, and how often which kind."""

import math

import pytest
import torch

from vitssl.draws import uniform
from vitssl.masks.corrupt import corrupt


def test_it_is_the_loop_over_patches():
    noise = uniform(0, 1, torch.arange(20), 36)
    places, masked, source = corrupt(noise, 7)
    for row, numbers in enumerate(noise.tolist()):
        order, kind, other = numbers[:12], numbers[12:24], numbers[24:]
        assert places[row].tolist() == sorted(range(12), key=order.__getitem__)[:7]
        for n in range(12):
            corrupted = n in places[row].tolist()
            assert masked[row, n] == (corrupted and kind[n] < 0.8)
            others = [(n + step) % 12 for step in range(1, 12)]
            swapped = corrupted and 0.8 <= kind[n] < 0.9
            assert source[row, n] == (others[int(other[n] * 11)] if swapped else n)


def test_eighty_ten_ten():
    places, masked, source = corrupt(uniform(0, 2, torch.arange(3000), 48), 8)
    own = torch.arange(16).expand_as(source)
    corrupted = torch.zeros_like(masked).scatter_(1, places, True)
    total = 3000 * 8
    assert int(corrupted.sum()) == total and not (masked & ~corrupted).any() and not ((source != own) & ~corrupted).any()
    assert not (masked & (source != own)).any()
    for found, share in ((masked, 0.8), (source != own, 0.1), (corrupted & ~masked & (source == own), 0.1)):
        assert abs(int(found.sum()) / total - share) < 4 * math.sqrt(share * (1 - share) / total)
    steps = torch.bincount(((source - own) % 16)[source != own], minlength=16)[1:] / int((source != own).sum())
    assert (steps - 1 / 15).abs().max() < 5 * math.sqrt(1 / 15 / (0.1 * total))


@pytest.mark.parametrize("numbers, num", [(12, 0), (12, 5), (3, 1), (13, 2)])
def test_a_number_that_cannot_be_is_refused(numbers: int, num: int):
    with pytest.raises(ValueError, match=f"cannot corrupt {num} patches by noise of {numbers}"):
        corrupt(torch.rand(2, numbers), num)
