"""Alarms by what was measured: each planted sign names its cause, two rows after it began, and health raises none."""

import pytest

from vitssl.inspect import alarms

WELL = {"loss": 6.0, "dino/loss": 6.0, "std": 0.3, "rankme": 12.0, "lidar": 9.0, "weights": 10.0}
WELL |= {"teacher_distance": 0.01, "teacher_agreement": 0.9}
WELL |= {"dino/usage": 40.0, "dino/entropy": 0.6}

ALONE = {key: value for key, value in WELL.items() if not key.startswith("teacher")}


def alarm(rows: list[dict], met: int = 256) -> tuple[str, str] | None:
    return alarms.alarm(rows, met=met)


SIGNS = [
    ("alias", {"teacher_distance": 0.0}, "alias, or teacher.momentum is 0"),
    ("divergence", {"dino/loss": 9.1}, "dino/loss is 9.1 and was 6 at first: the learning rate is too high"),
    ("divergence", {"weights": 41.0}, "4.1 times their norm: the learning rate is too high"),
    ("one prototype", {"dino/usage": 1.9}, "dino/usage is 1.9: all images go to a few prototypes; targets are not centred"),
    ("even targets", {"dino/entropy": 0.999}, "the teacher's temperature is too high"),
    ("collapse", {"std": 0.01}, "features have collapsed, spread 0.010"),
    ("collapse", {"rankme": 2.0, "lidar": 3.0}, "RankMe 2.0 (12.0), LiDAR 3.0 (9.0)"),
]


@pytest.mark.parametrize("name, sign, words", SIGNS)
def test_a_sign_that_lasts_names_its_cause(name: str, sign: dict, words: str) -> None:
    well = ALONE if "dino/loss" in sign else WELL
    rows = [well, well, well | sign]
    assert alarm(rows) is None
    found, said = alarm([*rows, well | sign])
    assert found == name and words in said
    assert alarm([*rows, well, well | sign]) is None  # it came and went


def test_a_loss_may_rise_where_a_teacher_sharpens_its_targets() -> None:
    assert alarm([WELL, *3 * [WELL | {"dino/loss": 9.1}]]) is None
    waiting = {key: value for key, value in WELL.items() if key != "teacher_distance"}
    assert alarm([waiting, *3 * [waiting | {"dino/loss": 9.1}]]) is None


def test_a_weight_that_grows_is_no_divergence() -> None:
    assert alarm([ALONE | {"loss": 0.1}, *3 * [ALONE | {"loss": 3.0}]]) is None


def test_few_images_that_choose_a_prototype_each_have_not_collapsed() -> None:
    rows = [WELL | {"dino/usage": 900.0}, *3 * [WELL | {"dino/usage": 8.0}]]
    assert alarm(rows, met=8) is None and alarm(rows, met=512)[0] == "one prototype"
    alone = [WELL | {"dino/usage": 1.6}, *3 * [WELL | {"dino/usage": 1.0}]]
    assert alarm(alone, met=1) is None and alarm(alone, met=16)[0] == "one prototype"


def test_health_is_silent() -> None:
    better = {"dino/loss": 2.0, "std": 0.9, "rankme": 60.0, "weights": 25.0, "teacher_distance": 0.2, "dino/entropy": 0.1}
    assert alarm([WELL]) is None
    assert alarm([WELL, *3 * [WELL | better]]) is None
    assert alarm([WELL, *3 * [{key: WELL[key] for key in ("dino/loss", "std", "rankme", "lidar", "weights")}]]) is None


def test_a_network_that_begins_with_one_direction_is_no_collapse() -> None:
    begun = WELL | {"std": 1e-4, "rankme": 1.0, "lidar": 1.0}
    assert alarm([begun, begun, begun, begun | {"rankme": 1.2}]) is None
    assert alarm([begun, WELL, begun, begun])[0] == "collapse"


def test_a_negative_loss_may_fall() -> None:
    assert alarm([ALONE | {"dino/loss": -1.0}, *3 * [ALONE | {"dino/loss": -1.9}]]) is None
    assert alarm([ALONE | {"dino/loss": -1.0}, *3 * [ALONE | {"dino/loss": -0.4}]])[0] == "divergence"


def test_a_mean_that_grows_is_no_collapse_while_images_are_told_apart() -> None:
    """What BYOL does in its first hundreds of steps, and learns."""
    assert alarm([WELL, *3 * [WELL | {"rankme": 2.4, "std": 0.1}]]) is None


def test_numbers_that_are_none_raise_no_alarm_and_hide_none() -> None:
    none = WELL | dict.fromkeys(("std", "rankme", "lidar"), float("nan"))
    assert alarm([WELL, *3 * [none]]) is None
    assert alarm([none, WELL, *2 * [WELL | {"std": 0.01}]])[0] == "collapse"


def test_an_alarm_that_was_told_hides_no_other() -> None:
    rows = [WELL, *3 * [WELL | {"dino/usage": 1.0, "std": 0.01}]]
    assert alarm(rows)[0] == "one prototype"
    assert alarms.alarm(rows, met=256, told={"one prototype"})[0] == "collapse"
    assert alarms.alarm(rows, met=256, told={"one prototype", "collapse"}) is None
