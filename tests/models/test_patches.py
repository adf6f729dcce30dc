"""Patch embeddings of other sizes and channels: timm as the oracle, and what is to stay as it was."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_patch_embed

from vitssl.models.patches import inflate_kernels, resize_kernels

SIZES = [((4, 4), (8, 8)), ((16, 16), (14, 14)), ((16, 16), (8, 8)), ((4, 6), (7, 5)), ((3, 3), (32, 2))]


def kernels(size: tuple[int, int], *, channels: int = 3) -> torch.Tensor:
    return torch.randn(5, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_sizes_as_timm_has_them(old: tuple[int, int], new: tuple[int, int]) -> None:
    before = kernels(old).float()
    after = resize_kernels(before, new)
    assert after.dtype == torch.float32 and after.shape == (5, 3, *new)
    torch.testing.assert_close(after, resample_patch_embed(before, list(new)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [((4, 4), (8, 8)), ((4, 4), (5, 7)), ((3, 5), (16, 6)), ((14, 14), (16, 16))])
def test_a_stretched_patch_is_answered_as_before(old: tuple[int, int], new: tuple[int, int]) -> None:
    before, patches = kernels(old), torch.randn(20, 3, *old, dtype=torch.float64)
    stretched = F.interpolate(patches, size=new, mode="bicubic", antialias=True)
    answers = F.conv2d(stretched, resize_kernels(before, new)).flatten(1)
    torch.testing.assert_close(answers, F.conv2d(patches, before).flatten(1), rtol=1e-9, atol=1e-9)
    naive = F.conv2d(stretched, F.interpolate(before, size=new, mode="bicubic", antialias=True)).flatten(1)
    assert (naive - answers).abs().max() > 0.1, "a kernel stretched like a picture answers otherwise"


def test_where_patches_shrink_no_other_kernel_is_closer() -> None:
    """Over white noise: a step in any direction takes the answers further away."""
    before, draw = kernels((8, 8)), torch.Generator().manual_seed(1)
    basis = torch.eye(64, dtype=torch.float64).reshape(64, 1, 8, 8).expand(-1, 3, -1, -1)  # of all grey patches
    small = F.interpolate(basis, size=(5, 5), mode="bicubic", antialias=True)
    after, wanted = resize_kernels(before, (5, 5)), F.conv2d(basis, before)
    least = (F.conv2d(small, after) - wanted).square().sum()
    for _ in range(10):
        step = 1e-3 * torch.randn(after.shape, dtype=torch.float64, generator=draw)
        assert (F.conv2d(small, after + step) - wanted).square().sum() > least


def test_an_equal_size_or_number_is_left_alone() -> None:
    before = kernels((4, 4))
    assert resize_kernels(before, (4, 4)) is before and inflate_kernels(before, 3) is before


@pytest.mark.parametrize(("own", "channels"), [(3, 1), (3, 2), (3, 4), (3, 6), (3, 10), (1, 3), (4, 3), (6, 4)])
def test_a_grey_image_is_answered_as_before(own: int, channels: int) -> None:
    before = kernels((4, 4), channels=own)
    grey = torch.randn(7, 1, 4, 4, dtype=torch.float64)
    after = inflate_kernels(before, channels)
    assert after.shape == (5, channels, 4, 4) and all(after[:, number].abs().max() > 0.1 for number in range(channels))
    torch.testing.assert_close(
        F.conv2d(grey.expand(-1, channels, -1, -1), after), F.conv2d(grey.expand(-1, own, -1, -1), before)
    )


def test_colours_are_repeated_in_turn() -> None:
    before = kernels((2, 2))
    torch.testing.assert_close(inflate_kernels(before, 6), torch.cat([before, before], dim=1) / 2)
    torch.testing.assert_close(inflate_kernels(before, 1), before.sum(dim=1, keepdim=True))
    torch.testing.assert_close(
        inflate_kernels(before, 4), torch.stack([before[:, 0] / 2, before[:, 1], before[:, 2], before[:, 0] / 2], dim=1)
    )
