"""Durations as people write them, and the schedule of MAE's official code."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from vitssl.errors import ConfigError
from vitssl.schedule import Duration, Schedule

GOLDEN = Path(__file__).parent / "golden" / "mae"

READ = [  # text, steps of a run of 1,000 with 12.5 an epoch, as it is written back
    ("300ep", 3750, "300ep"),
    ("0.5ep", 6, "0.5ep"),
    ("1.25 ep", 16, "1.25ep"),
    ("5%", 50, "5%"),
    ("0.26%", 3, "0.26%"),
    ("0.00001%", 0, "0.00001%"),
    ("12_500", 12_500, "12500"),
    ("12500steps", 12_500, "12500"),
    (7, 7, "7"),
    (1e5, 100_000, "100000"),
    ("1234567.25ep", 15432091, "1234567.25ep"),
    (Duration(3, "ep"), 38, "3ep"),
]
REFUSED = ["", "_", "-3", "300 epochs", "5 %%", "1.5", "ep", "%", "1e3", "nan", True, None, "3ep\n4", "1..5ep"]


@pytest.mark.parametrize("text, steps, written", READ)
def test_durations(text, steps: int, written: str):
    duration = Duration.parse(text)
    assert duration.steps(per_epoch=12.5, total=1000) == steps
    assert str(duration) == written


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_duration(text):
    with pytest.raises(ConfigError, match="300ep"):
        Duration.parse(text)


def test_a_share_of_nothing():
    with pytest.raises(ConfigError, match=r"5% is a share of the run, so it cannot say how long"):
        Duration.parse("5%").steps(per_epoch=10)


@given(st.floats(0, 1e12), st.sampled_from(["ep", "%"]))
def test_a_duration_is_written_exactly(value: float, unit: str):
    duration = Duration(value, unit)
    assert Duration.parse(str(duration)) == duration


def test_the_schedule_of_mae():
    facts = json.loads((GOLDEN / "meta.json").read_text())["config"]["sched"]
    schedule = Schedule(peak=facts["lr"], final=facts["min_lr"], warmup=facts["warmup_epochs"], total=facts["epochs"])
    table = json.loads((GOLDEN / "tables.json").read_text())["lr_schedule"]
    assert len(table) > 10
    for row in table:
        assert schedule.at(row["epoch"]) == pytest.approx(row["lr"], rel=1e-12, abs=1e-20)


schedules = st.builds(
    Schedule,
    peak=st.floats(1e-6, 10),
    start=st.floats(0, 10),
    final=st.floats(0, 10),
    warmup=st.integers(0, 50),
    total=st.integers(51, 500),
    shape=st.sampled_from(["cosine", "linear", "constant"]),
)


@given(schedules, st.floats(0, 600))
def test_a_schedule_begins_peaks_and_ends_where_it_says(schedule: Schedule, step: float):
    end = schedule.peak if schedule.shape == "constant" else schedule.final
    assert schedule.at(0) == pytest.approx(schedule.start if schedule.warmup else schedule.peak)
    assert schedule.at(schedule.warmup) == pytest.approx(schedule.peak)
    assert schedule.at(schedule.total) == schedule.at(schedule.total + 99) == pytest.approx(end, abs=1e-12)
    low, high = sorted((schedule.start, schedule.peak)) if step < schedule.warmup else sorted((schedule.peak, end))
    assert low - 1e-12 <= schedule.at(step) <= high + 1e-12


@pytest.mark.parametrize(
    "shape, quarter, half", [("cosine", (2 + 2**0.5) / 4, 0.5), ("linear", 0.75, 0.5), ("constant", 1.0, 1.0)]
)
def test_shapes(shape: str, quarter: float, half: float):
    schedule = Schedule(peak=1.0, warmup=10, total=110, shape=shape)
    assert [schedule.at(step) for step in (35, 60)] == pytest.approx([quarter, half])


def test_it_falls_at_milestones():
    """SimMIM's ViT-B: a tenth from epoch 700 of 800 on, and no sooner; after a warm-up of ten from 5e-7."""
    schedule = Schedule(4e-4, start=5e-7, warmup=10, total=800, shape="multistep", milestones=(700,))
    assert [schedule.at(epoch) for epoch in (0, 5, 10, 699)] == pytest.approx([5e-7, 2.0025e-4, 4e-4, 4e-4])
    assert [schedule.at(epoch) for epoch in (700, 799, 900)] == pytest.approx([4e-5] * 3)
    twice = replace(schedule, milestones=(700, 100), gamma=0.5)
    assert [twice.at(epoch) / 4e-4 for epoch in (99, 100, 700)] == pytest.approx([1, 0.5, 0.25])


def test_dinos_rate_but_for_its_warm_up():
    """That ends a step early with the peak, which comes again: ours rises by a fortieth where it rises by a thirty-ninth."""
    official = load_file(GOLDEN.parent / "dino/outputs.safetensors")["sched.lr_official_defaults"].tolist()
    peak = official[40]
    assert official[39] == peak == max(official)
    schedule = Schedule(peak, final=1e-6, warmup=40, total=200)
    assert [schedule.at(step) for step in range(40, 200)] == pytest.approx(official[40:], rel=1e-12)
    assert [schedule.at(step) * 40 / 39 for step in range(40)] == pytest.approx(official[:40], rel=1e-12)


def test_warm_up_beyond_the_run_is_only_a_ramp():
    schedule = Schedule(peak=1.0, warmup=10, total=5)
    assert [schedule.at(step) for step in (0, 4, 5)] == [0, 0.4, 0.5]
