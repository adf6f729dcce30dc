"""Absolute positions: the fixed 2-D sin-cos table, and three ways to carry positions to another grid.

The surprising part: everyone's bicubic is a different one. timm smooths before it shrinks (antialias, in float32), MAE does
not, DINO samples at a scale that is a tenth of a patch too large; values differ by 13-21 %. So the rule is named everywhere.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitssl.errors import ConfigError

Grid = tuple[int, int]
ResampleRule = Literal["timm", "mae", "dino"]
FIRST: dict[str, Literal["column", "row"]] = {"sincos": "column", "sincos_moco_v3": "row"}
"""Kinds of fixed positions -> the coordinate in the first half of their channels."""


def check_size(size: Grid, patch: Grid, what: str) -> Grid:
    """The grid of patches of a size in pixels. Raises ConfigError where there is none."""
    if size[0] % patch[0] or size[1] % patch[1] or min(size) < 1:
        fits = [max(1, round(pixels / side)) * side for pixels, side in zip(size, patch)]
        raise ConfigError(
            f"{what} {size[0]}x{size[1]} is not divisible by patches of {patch[0]}x{patch[1]}; nearest: {fits[0]}x{fits[1]}"
        )
    return size[0] // patch[0], size[1] // patch[1]


def sincos_2d(dim: int, grid: Grid, *, first: Literal["column", "row"] = "column") -> Tensor:
    """[gh * gw, dim] float64: sines and cosines of each patch's column and row, wavelengths 2 pi to 10000 * 2 pi.

    One half of the channels holds the coordinate named by ``first``, the other half the other coordinate; each half is all
    sines, then all cosines. MAE (He et al. 2022) puts the column first, MoCo v3 (Chen et al. 2021) the row.
    Raises ConfigError unless ``dim`` is divisible by 4.
    """
    if dim % 4:
        raise ConfigError(f"sin-cos positions need a width divisible by 4, not {dim}; choose another width or learned ones")
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    order = (column, row) if first == "column" else (row, column)
    return torch.cat([waves(coordinate.reshape(-1), dim // 2) for coordinate in order], dim=1)


def waves(values: Tensor, dim: int) -> Tensor:
    """[n] -> [n, dim], ``dim`` even: sines, then cosines, of wavelengths 2 pi to 10000 * 2 pi (Vaswani et al. 2017)."""
    frequency = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64, device=values.device) / (dim // 2))
    angles = values[:, None] * frequency
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


def resample(positions: Tensor, from_grid: Grid, to_grid: Grid, rule: ResampleRule, *, prefix: int = 0) -> Tensor:
    """[1, prefix + N, D] positions of ``from_grid`` -> [1, prefix + M, D] positions of ``to_grid``, bicubic.

    The first ``prefix`` positions belong to class and register tokens and pass unchanged. Rules: ``timm`` as
    ``timm.layers.resample_abs_pos_embed``, ``mae`` as MAE's ``util/pos_embed.py``, ``dino`` as DINO's
    ``vision_transformer.py``. Equal grids return ``positions`` itself.
    """
    assert positions.shape[1] == prefix + from_grid[0] * from_grid[1], (positions.shape, prefix, from_grid)
    if from_grid == to_grid:
        return positions
    table = positions[:, prefix:]
    table = table.float() if rule == "timm" or not table.dtype.is_floating_point or table.dtype.itemsize < 4 else table
    table = table.reshape(1, *from_grid, -1).permute(0, 3, 1, 2)  # [1, D, gh, gw]
    if rule == "dino":
        scale = [(new + 0.1) / old for new, old in zip(to_grid, from_grid)]
        table = F.interpolate(table, scale_factor=scale, mode="bicubic", align_corners=False)
        assert tuple(table.shape[-2:]) == to_grid, (table.shape, to_grid)
    else:
        table = F.interpolate(table, size=to_grid, mode="bicubic", align_corners=False, antialias=rule == "timm")
    table = table.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)  # [1, M, D]
    return torch.cat([positions[:, :prefix], table], dim=1) if prefix else table
