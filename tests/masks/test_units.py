"""Masks of units, patch by patch."""

import pytest
import torch

from vitssl.masks.units import unit_masks


def test_units_are_masked_whole():
    noise = torch.rand(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    masks = unit_masks(noise, (2, 3), (2, 4), 4)
    for row, mask in zip(noise.tolist(), masks.view(6, 4, 12).tolist()):
        for i in range(4):
            for j in range(12):
                unit = i // 2 * 3 + j // 4
                assert mask[i][j] == (sorted(row).index(row[unit]) < 4)


@pytest.mark.parametrize("num, drawn", [(7, 6), (-1, 6), (3, 5)])
def test_a_number_that_cannot_be_is_refused(num: int, drawn: int):
    with pytest.raises(ValueError, match=f"cannot mask {num} of 2x3 units by noise of {drawn}"):
        unit_masks(torch.rand(1, drawn), (2, 3), (1, 1), num)
