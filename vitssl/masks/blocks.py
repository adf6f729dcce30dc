"""Masks of rectangular blocks, as BEiT, data2vec, iBOT and DINOv2 draw them (Bao et al. 2022, algorithm 1).

Rectangles are proposed one after another; one that would mask too many patches, or none, is passed over, and ten such in a row
end the mask. So a mask has at most the number asked for, and often a little less; ``exact`` fills it up, because masks of
one size need neither a wait for their counts on a GPU nor weights of samples in a loss.
"""

import math

import torch
from torch import Tensor

PROPOSALS = 64  # rectangles per sample at most; the published settings need fewer (tests/masks/test_blocks.py)
PATIENCE = 10  # proposals in a row that fail before a mask is taken as it is (official codes of all four)


def block_noise(grid: tuple[int, int]) -> int:
    """How many uniform numbers per sample :func:`block_masks` wants: four per proposal, and one per patch to fill up by."""
    return 4 * PROPOSALS + grid[0] * grid[1]


def block_masks(
    noise: Tensor,
    grid: tuple[int, int],
    num: float | Tensor,
    *,
    min_area: float,
    max_area: float = math.inf,
    min_aspect: float = 0.3,
    exact: bool = False,
) -> Tensor:
    """[B, N] bool, True where masked, N = height x width of ``grid`` in raster order.

    noise: [B, block_noise(grid)] uniform in [0, 1). num: patches to mask, of all samples or [B], fractions allowed; a block's
    area is uniform between ``min_area`` and what is still to be masked (at most ``max_area``), in this order even where the
    first is larger, and its aspect log-uniform between ``min_aspect`` and its inverse. BEiT and data2vec: min_area 16; iBOT:
    (min(grid) // 3) ** 2 and num = ratio x N; DINOv2: 4, max_area N / 2. With ``exact`` single patches fill up to num.
    Raises ValueError for noise of another length.
    """
    if noise.shape[1] != block_noise(grid):
        raise ValueError(f"noise must be [B, {block_noise(grid)}] for a grid of {grid[0]}x{grid[1]}, not {list(noise.shape)}")
    proposals, filling = noise.split([4 * PROPOSALS, grid[0] * grid[1]], dim=1)
    num = torch.as_tensor(num, dtype=noise.dtype, device=noise.device).expand(len(noise))
    mask = torch.zeros(len(noise), *grid, dtype=torch.bool, device=noise.device)
    count = torch.zeros_like(num)
    failures = torch.zeros_like(num)
    for area, aspect, top, left in proposals.view(-1, PROPOSALS, 4).permute(1, 2, 0):  # each [B]
        active = (count < num) & (failures < PATIENCE)
        if mask.device.type == "cpu" and not active.any():  # elsewhere the question would cost a wait
            break
        room = (num - count).clamp(max=max_area)
        height, width = _sides(min_area + (room - min_area) * area, aspect, min_aspect)
        block = _block(height, width, top, left, grid) & ~mask
        new = block.sum(dim=(1, 2))
        good = active & (height < grid[0]) & (width < grid[1]) & (new > 0) & (new <= room)
        mask |= block & good[:, None, None]
        count = count + new * good
        failures = torch.where(good, 0, failures + 1)
    mask = mask.flatten(1)
    return _filled(mask, num, filling) if exact else mask


def _sides(area: Tensor, aspect: Tensor, min_aspect: float) -> tuple[Tensor, Tensor]:
    """Height and width in patches, rounded; ``aspect`` uniform."""
    ratio = torch.exp(math.log(min_aspect) * (1 - 2 * aspect))
    return torch.round(torch.sqrt(area * ratio)), torch.round(torch.sqrt(area / ratio))


def _block(height: Tensor, width: Tensor, top: Tensor, left: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, *grid] bool: True in a rectangle whose place is uniform; anything where it is larger than the grid."""
    inside = []
    for size, side, place in zip(grid, (height, width), (top, left)):
        first = torch.floor(place * (size - side + 1))[:, None]
        index = torch.arange(size, device=side.device)
        inside.append((index >= first) & (index < first + side[:, None]))
    rows, columns = inside
    return rows[:, :, None] & columns[:, None, :]


def _filled(mask: Tensor, num: Tensor, noise: Tensor) -> Tensor:
    """The mask and, of the patches left, those with the least noise, ``num`` in all."""
    order = torch.argsort(noise.masked_fill(mask, -1.0), dim=1, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return ranks < num[:, None]
