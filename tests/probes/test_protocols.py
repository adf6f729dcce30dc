"""Every protocol by its name, on features that tell the classes and on features that tell nothing."""

import pytest
import torch

from vitssl.probes.protocols import PROTOCOLS, SOURCES, Split, judge, needed, wilson


def split(num: int, *, seed: int, told: float) -> Split:
    """Four classes; ``told`` is how far apart they lie."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (num,), generator=draw)
    base = told * torch.eye(8)[labels] + torch.randn(num, 8, generator=draw)
    patches = torch.randn(num, 5, 8, generator=draw)
    patches[:, 2] += 2 * told * torch.eye(8)[labels]
    other = torch.cat([base, torch.randn(num, 24, generator=draw)], dim=1)
    return Split({"pooled": base, "class": base, "mean": patches.mean(1), "class_4": other, "patches": patches}, labels)


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name != "spectrum"])
def test_what_tells_is_found_and_what_does_not_is_chance(name: str) -> None:
    rows = judge(name, split(400, seed=0, told=5.0), split(200, seed=1, told=5.0), seeds=2)
    assert rows and all(row.protocol == name and row.value > (0.7 if "1 shots" in row.setting else 0.9) for row in rows)
    (blind, *_) = judge(name, split(400, seed=0, told=0.0), split(400, seed=1, told=0.0), seeds=1)
    assert 0.15 < blind.value < 0.37
    assert judge(name, split(400, seed=0, told=5.0), split(200, seed=1, told=5.0), seeds=2) == rows, "the same again"


def test_settings_are_chosen_on_what_is_held_out() -> None:
    """The test split decides nothing: with its labels at random the same settings are chosen."""
    train, test = split(300, seed=0, told=3.0), split(200, seed=1, told=3.0)
    wrong = Split(test.features, test.labels[torch.randperm(200, generator=torch.Generator().manual_seed(0))])
    for name in ("logistic", "linear_dinov2", "attentive"):
        assert [row.setting for row in judge(name, train, test, seeds=1)] == [
            row.setting for row in judge(name, train, wrong, seeds=1)
        ]


def test_linear_heads_are_trained_on_crops_alone() -> None:
    """Crops that tell where the centres do not: linear heads learn from them; the centre crop as the only one is no change."""
    told, blind = split(400, seed=0, told=5.0), split(400, seed=2, told=0.0)
    test = split(200, seed=1, told=5.0)
    shown = Split(blind.features, told.labels, (told.features, told.features))
    for name in ("linear_mae", "linear_dinov2"):
        as_now = judge(name, told, test, seeds=1)
        (row,) = judge(name, Split(told.features, told.labels, (told.features,)), test, seeds=1)
        assert row.setting == f"{as_now[0].setting}, 1 crops" and row.value == as_now[0].value
    (row,) = judge("linear_mae", shown, test, seeds=1)
    assert row.value > 0.9 and row.setting.endswith(", 2 crops")
    assert shown.take(shown.labels == 1).crops[1]["pooled"].shape == told.features["pooled"][told.labels == 1].shape


def test_seeds_give_rows_of_their_own() -> None:
    rows = judge("fewshot", split(400, seed=0, told=2.0), split(200, seed=1, told=2.0), seeds=3)
    assert {row.setting for row in rows} == {"1 shots", "5 shots", "10 shots", "25 shots"} and {row.seed for row in rows} == {
        0,
        1,
        2,
    }
    assert len({row.value for row in rows if row.setting == "1 shots"}) > 1


def test_fewer_images_than_the_fewest_neighbours() -> None:
    (row,) = judge("knn", split(3, seed=0, told=1.0), split(20, seed=1, told=1.0))
    assert row.setting == "k=3"


def test_spectrum_and_what_is_needed() -> None:
    rows = judge("spectrum", split(100, seed=0, told=1.0), split(200, seed=1, told=0.0))
    assert [row.protocol for row in rows] == ["rankme", "alpha_req"] and 7 < rows[0].value <= 8
    assert needed(["knn", "fewshot"]) == () and needed(["attentive", "linear_dino"]) == ("patches", "class", "mean", "class_4")
    assert set(SOURCES) == set(PROTOCOLS) and all(SOURCES.values()), "a page says what each of them is"


@pytest.mark.parametrize(
    ("accuracy", "num", "low", "high"), [(0.5, 100, 0.4038, 0.5962), (1.0, 10, 0.7225, 1.0), (0.0, 10, 0.0, 0.2775)]
)
def test_wilson(accuracy: float, num: int, low: float, high: float) -> None:
    assert wilson(accuracy, num) == pytest.approx((low, high), abs=1e-4)
