"""Sin-cos tables and the three interpolation rules against the official implementations' numbers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed

from vitssl.errors import ConfigError
from vitssl.models.positions import resample, sincos_2d

GOLDEN = Path(__file__).parents[1] / "golden"
VALUES = load_file(GOLDEN / "positions" / "values.safetensors")
MAE = load_file(GOLDEN / "mae" / "outputs.safetensors")
CASES = {  # (from, to, prefix tokens)
    "mae.0": ((4, 4), (7, 7), 1),
    "mae.1": ((7, 7), (5, 5), 1),
    "mae.2": ((5, 5), (9, 9), 2),
    "mae.3": ((14, 14), (10, 10), 1),
    "timm.0": ((4, 4), (7, 3), 1),
    "timm.2": ((3, 5), (5, 4), 0),
    "timm.3": ((7, 7), (5, 5), 2),
    "dino.0": ((4, 4), (6, 6), 1),
    "dino.1": ((4, 4), (5, 3), 1),
}


@pytest.mark.parametrize("case", CASES)
def test_resample_equals_the_official_rule(case: str):
    from_grid, to_grid, prefix = CASES[case]
    before, expected = VALUES[f"{case}.from"].double(), VALUES[f"{case}.to"]
    after = resample(before, from_grid, to_grid, case.partition(".")[0], prefix=prefix)
    tolerance = 1e-6 if case.startswith("timm") else 1e-12
    torch.testing.assert_close(after, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_the_rules_differ():
    before = VALUES["mae.3.from"]
    results = {rule: resample(before, (14, 14), (10, 10), rule, prefix=1) for rule in ("timm", "mae", "dino")}
    assert (results["mae"] - results["timm"]).abs().max() > 0.1
    assert (results["mae"] - results["dino"]).abs().max() > 0.01


def test_timm_rule_equals_the_installed_timm():
    before = torch.randn(1, 3 + 35, 8)
    expected = resample_abs_pos_embed(before, new_size=[4, 9], old_size=[5, 7], num_prefix_tokens=3)
    torch.testing.assert_close(resample(before, (5, 7), (4, 9), "timm", prefix=3), expected)


@pytest.mark.parametrize("rule", ["timm", "mae", "dino"])
def test_an_equal_grid_is_left_alone(rule: str):
    before = torch.randn(1, 17, 8)
    assert resample(before, (4, 4), (4, 4), rule, prefix=1) is before
    assert resample(before, (4, 4), (2, 8), rule, prefix=1).shape == before.shape


@pytest.mark.parametrize("rule", ["timm", "mae", "dino"])
def test_half_precision_is_computed_in_single(rule: str):
    before = torch.randn(1, 16, 8).bfloat16()
    expected = resample(before.float(), (4, 4), (6, 5), rule).bfloat16()
    torch.testing.assert_close(resample(before, (4, 4), (6, 5), rule), expected, rtol=0, atol=0)


@pytest.mark.parametrize("key", [key for key in MAE if key.startswith("sincos.")])
def test_sincos_equals_mae(key: str):
    dim, side = (int(part[1:]) for part in key.split(".")[1:3])
    expected = MAE[key][int(key.endswith("cls1")) :]
    torch.testing.assert_close(sincos_2d(dim, (side, side)), expected, rtol=0, atol=1e-14)


def test_sincos_row_first_equals_moco_v3():
    table = VALUES["sincos.row_first"]
    torch.testing.assert_close(sincos_2d(16, (4, 4), first="row").float(), table[0, 1:], rtol=0, atol=1e-6)
    assert (sincos_2d(16, (4, 4)).float() - table[0, 1:]).abs().max() > 0.5


def test_sincos_by_hand_on_an_oblong_grid():
    table = sincos_2d(8, (2, 3))  # patch 4 is row 1, column 1; frequencies 1 and 1/100
    angles = torch.tensor([1.0, 0.01], dtype=torch.float64)
    half = torch.cat([angles.sin(), angles.cos()])
    torch.testing.assert_close(table[4], torch.cat([half, half]))
    torch.testing.assert_close(table[2, 4:], torch.tensor([0.0, 0, 1, 1], dtype=torch.float64))  # row 0


def test_sincos_refuses_a_width_it_cannot_split():
    with pytest.raises(ConfigError, match="divisible by 4, not 30"):
        sincos_2d(30, (2, 2))
