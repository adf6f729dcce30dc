"""I-JEPA's masks: several target blocks, and a context block from which the targets are cut out (Assran et al. 2023).

Two habits of the official code are kept because its recipes were tuned with them: one random number sets both a block's area
and its aspect, and no block ever holds the last row or column of its range of places. Contexts of a batch must be of one
length; the official code cuts all to the shortest of a GPU's, in raster order. Here the length is given (:func:`cut`): what
decides it must not depend on how many processes share the batch.
"""

import math

import torch
from torch import Tensor

Grid = tuple[int, int]


def block_size(number: float, grid: Grid, scale: tuple[float, float], aspect: tuple[float, float]) -> Grid:
    """Height and width in patches of a step's blocks; ``number`` uniform in [0, 1), scale as a fraction of all patches.

    Always smaller than the grid. Official code, ``MaskCollator._sample_block_size``.
    """
    area = int(grid[0] * grid[1] * (scale[0] + number * (scale[1] - scale[0])))
    ratio = aspect[0] + number * (aspect[1] - aspect[0])
    sides = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    return tuple(max(1, min(side, most - 1)) for side, most in zip(sides, grid))


def multiblock(noise: Tensor, grid: Grid, *, target: Grid, context: Grid, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """(targets [B, num, n] int64 in raster order, context [B, N] bool without them, taken [B, N] bool by any of them).

    noise: [B, 2 x (num + 1)] uniform: top and left of each target block, then of the context block; target and context:
    their sizes, smaller than the grid. n patches in a target. Raises ValueError for noise of another length.
    """
    if noise.shape[1] != 2 * (num + 1):
        raise ValueError(f"noise must be [B, {2 * (num + 1)}] for {num} targets, not {list(noise.shape)}")
    places = noise.view(-1, num + 1, 2)
    targets = _patches(places[:, :num], grid, target)  # [B, num, n]
    taken = _mask(targets, grid)
    return targets, _mask(_patches(places[:, num:], grid, context), grid) & ~taken, taken


def cut(context: Tensor, taken: Tensor, num: int) -> Tensor:
    """[B, num] int64: the first ``num`` patches of each context in raster order; context and taken [B, N] bool.

    Where a context is shorter, the first of the other patches that no target has taken complete it, and of the targets only
    where these do not suffice.
    """
    rank = (~context).to(torch.int8) + taken.to(torch.int8)  # 0 of the context, 1 of nothing, 2 of a target
    return torch.argsort(rank, dim=1, stable=True)[:, :num]


def _patches(places: Tensor, grid: Grid, size: Grid) -> Tensor:
    """places [B, M, 2] uniform -> [B, M, n] int64, the patches of blocks of ``size``."""
    top, left = (torch.floor(places[..., i] * (grid[i] - size[i])).to(torch.int64) for i in (0, 1))
    rows, columns = (torch.arange(side, device=places.device) for side in size)
    inside = (rows[:, None] * grid[1] + columns).flatten()  # of the block in the corner
    return (top * grid[1] + left)[..., None] + inside


def _mask(patches: Tensor, grid: Grid) -> Tensor:
    """[B, M, n] -> [B, N] bool: which are in any of the M."""
    mask = torch.zeros(len(patches), grid[0] * grid[1], dtype=torch.bool, device=patches.device)
    return mask.scatter_(1, patches.flatten(1), True)
