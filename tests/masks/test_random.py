"""Random masking: properties, and the distribution over patches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitssl.draws import uniform
from vitssl.masks.random import random_keep


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 4), patches=st.integers(1, 20), data=st.data())
def test_kept_and_removed_share_the_patches_out(batch: int, patches: int, data):
    num_keep = data.draw(st.integers(1, patches))
    noise = uniform(data.draw(st.integers(0, 9)), 1, torch.arange(batch), patches)
    keep, mask = random_keep(noise, num_keep)
    assert keep.shape == (batch, num_keep)
    for b in range(batch):
        kept, removed = set(keep[b].tolist()), set(mask[b].nonzero()[:, 0].tolist())
        assert len(kept) == num_keep
        assert kept | removed == set(range(patches))
        assert not kept & removed
        assert keep[b].tolist() == sorted(range(patches), key=lambda n: noise[b, n].item())[:num_keep]


def test_every_patch_is_kept_equally_often():
    keep, mask = random_keep(uniform(3, 5, torch.arange(8000), 16), 4)
    share = (~mask).double().mean(dim=0)
    assert (share - 0.25).abs().max() < 5 * (0.25 * 0.75 / 8000) ** 0.5
    first = torch.bincount(keep[:, 0], minlength=16) / 8000  # the order is random as well
    assert (first - 1 / 16).abs().max() < 5 * (1 / 16 / 8000) ** 0.5


@pytest.mark.parametrize("num_keep", [0, 17])
def test_an_impossible_number_is_refused(num_keep: int):
    with pytest.raises(ValueError, match=f"cannot keep {num_keep} of 16"):
        random_keep(torch.rand(1, 16), num_keep)
