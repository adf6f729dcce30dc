"""Block-wise masks: against a loop over patches, and against what the official generators of three methods came to."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vitssl.draws import uniform
from vitssl.masks.blocks import PATIENCE, PROPOSALS, block_masks, block_noise

GOLDEN = Path(__file__).parents[1] / "golden"
GRID = (14, 14)


def noise(num: int, grid: tuple[int, int] = GRID, purpose: int = 1) -> Tensor:
    return uniform(0, purpose, torch.arange(num), block_noise(grid))


def official(name: str) -> dict:
    return json.loads((GOLDEN / name / "tables.json").read_text())["mask_stats"]


def same_mean(found: Tensor, mean: float, std: float, draws: int) -> None:
    """Within four standard errors of the difference of two means."""
    error = std * math.sqrt(1 / draws + 1 / len(found))
    assert abs(found.double().mean().item() - mean) < 4 * error


def one_by_one(numbers: list[float], grid: tuple[int, int], num: float, *, min_area, max_area, min_aspect) -> list[bool]:
    """Slow oracle: the mask of one sample, patch by patch, as the papers' codes go about it."""
    mask, count, failures = [[False] * grid[1] for _ in range(grid[0])], 0, 0
    for k in range(PROPOSALS):
        if count >= num or failures == PATIENCE:
            break
        area, aspect, top, left = numbers[4 * k : 4 * k + 4]
        room = min(num - count, max_area)
        area = min_area + (room - min_area) * area
        aspect = math.exp(math.log(min_aspect) + (math.log(1 / min_aspect) - math.log(min_aspect)) * aspect)
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        failures += 1
        if height < grid[0] and width < grid[1]:
            top, left = math.floor(top * (grid[0] - height + 1)), math.floor(left * (grid[1] - width + 1))
            new = [(i, j) for i in range(top, top + height) for j in range(left, left + width) if not mask[i][j]]
            if 0 < len(new) <= room:
                for i, j in new:
                    mask[i][j] = True
                count, failures = count + len(new), 0
    return [value for row in mask for value in row]


@pytest.mark.parametrize(
    "grid, num, settings",
    [
        (GRID, 120, {"min_area": 16}),
        (GRID, 0.43 * 196, {"min_area": 16}),
        (GRID, 98, {"min_area": 4, "max_area": 40}),
        ((5, 9), 20, {"min_area": 1, "min_aspect": 0.5}),
        ((4, 4), 0, {"min_area": 1}),
        ((8, 8), 3, {"min_area": 30}),  # less than the smallest block
    ],
)
def test_it_is_the_loop_over_patches(grid: tuple[int, int], num: float, settings: dict):
    numbers = noise(40, grid)
    found = block_masks(numbers, grid, num, **settings)
    every = {"max_area": math.inf, "min_aspect": 0.3} | settings
    assert found.tolist() == [one_by_one(row.tolist(), grid, num, **every) for row in numbers]
    assert found.shape == (40, grid[0] * grid[1]) and found.dtype == torch.bool


def test_masks_as_often_and_as_large_as_data2vec():
    table = official("data2vec")
    found = block_masks(noise(2000), GRID, table["target"], min_area=16).sum(dim=1)
    same_mean(found, table["mean"], table["std"], table["draws"])
    assert found.max() == table["target"] and found.min() > table["min"] - 10


def test_masks_as_often_and_as_large_as_dinov2():
    for purpose, (num, table) in enumerate(official("dinov2").items()):
        found = block_masks(noise(2000, purpose=purpose), GRID, int(num), min_area=4, max_area=98).sum(dim=1)
        same_mean(found, table["mean"], table["std"], 1000)
        whole = table["fraction_exact"]
        same_mean(found == int(num), whole, math.sqrt(whole * (1 - whole)), 1000)


def test_masks_as_often_and_as_large_as_ibot():
    """The ratio of a crop is 0 or uniform in [.1, .5], each half of the time."""
    table, numbers = official("ibot"), uniform(0, 9, torch.arange(4000), 2)
    ratio = torch.where(numbers[:, 0] < 0.5, 0.0, 0.1 + 0.4 * numbers[:, 1])
    found = block_masks(noise(4000), GRID, ratio * 196, min_area=(14 // 3) ** 2).sum(dim=1) / 196
    assert (found <= ratio).all()
    same_mean(found, table["mean_ratio"], table["std_ratio"], 2000)
    same_mean(found == 0, table["fraction_empty"], 0.5, 2000)
    filled = found[found > 0]
    same_mean(filled, table["mean_of_nonempty"], table["std_of_nonempty"], 1007)
    for quantile, value in table["quantiles_nonempty"].items():
        share = float(quantile)
        same_mean(filled <= value + 1e-9, share, math.sqrt(share * (1 - share)) + 0.1, 1007)  # values are steps of 1 / 196


@pytest.mark.parametrize("seed", range(5))
def test_of_any_size_asked_for(seed: int):
    """At most num; with ``exact`` num, of which the others are part; one number for all as one each; a row is itself."""
    generator = torch.Generator().manual_seed(seed)
    grid = tuple(torch.randint(2, 12, (2,), generator=generator).tolist())
    numbers = noise(24, grid, purpose=seed)
    num = torch.randint(0, grid[0] * grid[1] + 1, (24,), generator=generator)
    some, whole = (block_masks(numbers, grid, num, min_area=2, exact=exact) for exact in (False, True))
    assert (some.sum(dim=1) <= num).all() and torch.equal(whole.sum(dim=1), num)
    assert (whole | ~some).all()
    for row in range(24):
        own = block_masks(numbers[row : row + 1], grid, int(num[row]), min_area=2, exact=True)
        assert torch.equal(own[0], whole[row])


def test_the_published_settings_need_fewer_proposals():
    numbers = noise(2000)
    for num, smallest in ((120, 16), (98, 4), (98, 16)):
        found = block_masks(numbers, GRID, num, min_area=smallest)
        changed = torch.cat([numbers[:, : 4 * (PROPOSALS - 10)], numbers[:, 40:80], numbers[:, 4 * PROPOSALS :]], dim=1)
        assert torch.equal(block_masks(changed, GRID, num, min_area=smallest), found)


def test_noise_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"noise must be \[B, 452\] for a grid of 14x14, not \[3, 196\]"):
        block_masks(torch.rand(3, 196), GRID, 10, min_area=4)
