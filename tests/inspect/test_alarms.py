"""Alarms by what was measured: each planted sign names its cause, two rows after it began, and health raises none."""

import pytest

from vitssl.inspect.alarms import alarm

WELL = {"loss": 6.0, "std": 0.3, "rankme": 12.0, "weights": 10.0, "teacher_distance": 0.01}
WELL |= {"dino/usage": 40.0, "dino/entropy": 0.6}

ALONE = {key: value for key, value in WELL.items() if key != "teacher_distance"}

SIGNS = [
    ("alias", {"teacher_distance": 0.0}, "alias, or teacher.momentum is 0"),
    ("divergence", {"loss": 9.1}, "was 6 at first: the learning rate is too high"),
    ("divergence", {"weights": 41.0}, "4.1 times their norm: the learning rate is too high"),
    ("one prototype", {"dino/usage": 1.9}, "dino/usage is 1.9: all images go to a few prototypes; targets are not centred"),
    ("even targets", {"dino/entropy": 0.999}, "the teacher's temperature is too high"),
    ("collapse", {"std": 0.01}, "features have collapsed, spread 0.010"),
    ("collapse", {"rankme": 2.0}, "RankMe 2.0 (12.0)"),
]


@pytest.mark.parametrize("name, sign, words", SIGNS)
def test_a_sign_that_lasts_names_its_cause(name: str, sign: dict, words: str) -> None:
    well = ALONE if "loss" in sign else WELL
    rows = [well, well, well | sign]
    assert alarm(rows) is None
    found, said = alarm([*rows, well | sign])
    assert found == name and words in said
    assert alarm([*rows, well, well | sign]) is None  # it came and went


def test_a_loss_may_rise_where_a_teacher_sharpens_its_targets() -> None:
    assert alarm([WELL, *3 * [WELL | {"loss": 9.1}]]) is None


def test_health_is_silent() -> None:
    better = {"loss": 2.0, "std": 0.9, "rankme": 60.0, "weights": 25.0, "teacher_distance": 0.2, "dino/entropy": 0.1}
    assert alarm([WELL]) is None
    assert alarm([WELL, *3 * [WELL | better]]) is None
    assert alarm([WELL, *3 * [{key: WELL[key] for key in ("loss", "std", "rankme", "weights")}]]) is None


def test_a_network_that_begins_with_one_direction_is_no_collapse() -> None:
    begun = WELL | {"std": 1e-4, "rankme": 1.0}
    assert alarm([begun, begun, begun, begun | {"rankme": 1.2}]) is None
    assert alarm([begun, WELL, begun, begun])[0] == "collapse"


def test_a_negative_loss_may_fall() -> None:
    assert alarm([ALONE | {"loss": -1.0}, *3 * [ALONE | {"loss": -1.9}]]) is None
    assert alarm([ALONE | {"loss": -1.0}, *3 * [ALONE | {"loss": -0.4}]])[0] == "divergence"


def test_numbers_that_are_none_raise_no_alarm() -> None:
    assert alarm([WELL, *3 * [WELL | {"std": float("nan"), "rankme": float("nan")}]]) is None
