"""I-JEPA's masks: against a loop over patches, and against what the official collator came to in 500 batches."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vitssl.draws import uniform
from vitssl.masks.multiblock import block_size, cut, multiblock

GOLDEN = Path(__file__).parents[1] / "golden" / "ijepa"
STATISTICS = json.loads((GOLDEN / "meta.json").read_text())["config"]["stat"]
COUNTS = load_file(GOLDEN / "outputs.safetensors")
GRID, BATCH = (14, 14), STATISTICS["B"]


def sizes(batch: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of targets and context in an official batch, whose generator is seeded with its number."""
    first, second = torch.rand(2, generator=torch.Generator().manual_seed(batch)).tolist()
    target = block_size(first, GRID, STATISTICS["pred_mask_scale"], STATISTICS["aspect_ratio"])
    return target, block_size(second, GRID, STATISTICS["enc_mask_scale"], (1.0, 1.0))


def masks(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    target, context = sizes(batch)
    noise = uniform(0, batch, torch.arange(BATCH), 10)
    return multiblock(noise, GRID, target=target, context=context, num=4)


def test_blocks_are_of_the_official_sizes():
    """Targets are not cut, so their counts tell the size of every batch."""
    found = [sizes(batch)[0] for batch in range(500)]
    assert [height * width for height, width in found] == COUNTS["mask_stats.target_counts"].tolist()


def test_contexts_are_as_long_and_patches_shown_as_often():
    """Cut to the shortest of the batch, as the official code does; within four standard errors."""
    lengths, shown, asked = [], torch.zeros(196), torch.zeros(196)
    for batch in range(500):
        targets, context, taken = masks(batch)
        lengths.append(int(context.sum(dim=1).min()))
        keep = cut(context, taken, lengths[-1])
        assert context.gather(1, keep).all()
        shown += torch.bincount(keep.flatten(), minlength=196)
        asked += torch.bincount(targets.flatten(), minlength=196)
    official = COUNTS["mask_stats.context_counts"].double()
    error = official.std() * math.sqrt(2 / 500)
    assert abs(torch.tensor(lengths).double().mean() - official.mean()) < 4 * error
    assert abs(torch.tensor(lengths).double().std() / official.std() - 1) < 4 * math.sqrt(1 / 500)
    for found, name, per in ((shown, "context", 1), (asked, "target", 4)):
        frequency = COUNTS[f"mask_stats.{name}_frequency"].flatten().double()
        found = found.double() / (500 * BATCH * per)
        assert torch.equal(found == 0, frequency == 0)  # nowhere in the last row or column
        spread = (frequency * (1 - frequency) * 2 / 500).sqrt()  # as if the rows of a batch, of one size, were one draw
        assert ((found - frequency).abs() <= 4.5 * spread).all()


@pytest.mark.parametrize("batch", range(5))
def test_multiblock_is_the_loop_over_patches(batch: int):
    target, context = sizes(batch)
    noise = uniform(0, batch, torch.arange(BATCH), 10)
    found = multiblock(noise, GRID, target=target, context=context, num=4)
    for row in range(BATCH):
        blocks = []
        for k, (height, width) in enumerate([target] * 4 + [context]):
            top, left = int(noise[row, 2 * k] * (14 - height)), int(noise[row, 2 * k + 1] * (14 - width))
            blocks.append([i * 14 + j for i in range(top, top + height) for j in range(left, left + width)])
        *targets, inside = blocks
        taken = {patch for block in targets for patch in block}
        assert found[0][row].tolist() == targets
        assert found[1][row].nonzero()[:, 0].tolist() == [patch for patch in inside if patch not in taken]
        assert set(found[2][row].nonzero()[:, 0].tolist()) == taken


@pytest.mark.parametrize("num, expected", [(2, [1, 4]), (3, [1, 4, 0]), (5, [1, 4, 0, 5, 2]), (6, [1, 4, 0, 5, 2, 3])])
def test_a_short_context_is_completed_by_what_no_target_took(num: int, expected: list[int]):
    context, taken = (torch.tensor([[n in those for n in range(6)]]) for those in ({1, 4}, {2, 3}))
    assert cut(context, taken, num).tolist() == [expected]


@pytest.mark.parametrize("grid", [(2, 2), (2, 9), (4, 4), (32, 32)])
def test_a_block_is_smaller_than_any_grid(grid: tuple[int, int]):
    for number in (0.0, 0.3, 0.999):
        for scale, aspect in (((0.15, 0.2), (0.75, 1.5)), ((0.85, 1.0), (1.0, 1.0)), ((0.01, 0.02), (1.0, 1.0))):
            size = block_size(number, grid, scale, aspect)
            assert all(1 <= side < most for side, most in zip(size, grid))


def test_noise_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"noise must be \[B, 10\] for 4 targets, not \[1, 8\]"):
        multiblock(torch.rand(1, 8), GRID, target=(2, 2), context=(9, 9), num=4)
