"""Health on the way: what is measured, and planted collapses, told with their cause, stopped, or set back."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from outcome import needs_deepspeed, refused

MOCO = ("objectives.mae=null", "objectives.moco_v3={hidden: 16, out: 8}", "heldout.pictures=0", "heldout.every=99")
WATCHED = (*MOCO, "health.every=2", "health.images=12")
ALIAS = ("teacher={momentum: 0, final: 0}",)
HEAD = "{prototypes: 64, hidden: 64, bottleneck: 16}"
LATER = """
from vitssl.models.twin import Twin
real, calls = Twin.update, {}
def update(self, momentum):
    calls[id(self)] = calls.get(id(self), 0) + 1
    real(self, momentum if calls[id(self)] < 5 else 0.0)
Twin.update = update
"""
ALWAYS = """
from vitssl.models.twin import Twin
real, calls = Twin.update, []
def update(self, momentum):
    calls.append(momentum)
    real(self, momentum if len(calls) < 23 else 0.0)  # two averages a step
Twin.update = update
"""
NONE = """
from vitssl.models.twin import Twin
real, calls = Twin.update, []
def update(self, momentum):
    calls.append(momentum)
    real(self, momentum if len(calls) < 4 else float("nan"))
Twin.update = update
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_measured(pretrain: Callable, tmp_path: Path, processes: int) -> None:
    run = pretrain(tmp_path / "run", *WATCHED, "health.on_alarm=warn", "optim.base_lr=1e-4", processes=processes).ok()
    rows = run.rows("health.jsonl")
    assert [row["step"] for row in rows] == list(range(0, 21, 2))
    for row in rows:
        assert row["moco_v3/token_gradient"] > 0
        assert 0 < row["attention_entropy_0"] <= 1 and 0 < row["attention_entropy_1"] <= 1
        assert 0 < row["std"] < 1.5 and 1 <= row["rankme"] <= 12 and 1 <= row["lidar"] <= 24
    losses = run.losses()
    assert rows[3]["loss"] == rows[3]["moco_v3/loss"] == pytest.approx((losses[4] + losses[5]) / 2)
    assert rows[0]["teacher_distance"] == 0 < rows[1]["teacher_distance"] and rows[1]["teacher_agreement"] < 1
    assert "alarm" not in run.out


def test_a_teacher_that_is_the_student_is_told_once_and_the_run_goes_on(pretrain: Callable, tmp_path: Path) -> None:
    run = pretrain(tmp_path / "run", *WATCHED, *ALIAS, "health.on_alarm=warn").ok()
    assert run.out.count("alarm at step 4: the teacher's weights are the student's: the teacher is an alias") == 1


def test_an_encoder_that_waits_is_no_alias(pretrain: Callable, exported, tmp_path: Path) -> None:
    given = (f"init.weights={exported.folder}", "init.head_warmup=10", "optim.base_lr=1e-4", "health.on_alarm=stop")
    rows = pretrain(tmp_path / "run", *WATCHED, *given).ok().rows("health.jsonl")
    assert [row["step"] for row in rows if "teacher_distance" in row] == list(range(12, 21, 2))


def test_features_that_are_no_numbers_are_measured_and_the_loss_is_told(pretrain: Callable, tmp_path: Path) -> None:
    options = ("objectives.ijepa={min_keep: 2, shortest_of: 4, predictor: {dim: 16, depth: 1}}", "encoder.class_token=false")
    watched = (*WATCHED[2:], "objectives.mae=null", "health.on_alarm=stop")
    run = pretrain(tmp_path / "run", *watched, *options, trap=NONE)
    refused(run, "loss is nan")
    assert [row["std"] is None for row in run.rows("health.jsonl")][-1]


def test_a_learning_rate_of_a_hundred_times_stops_the_run(pretrain: Callable, tmp_path: Path) -> None:
    run = pretrain(tmp_path / "run", *WATCHED, "health.on_alarm=stop", "optim.base_lr=1", "optim.warmup=0")
    refused(run, "stopped at step ", "saved: ", "the learning rate is too high", "health.on_alarm=warn goes on all the same")
    step = run.rows("health.jsonl")[-1]["step"]
    assert step <= 10 and run.checkpoints()[-1].name == f"step_{step:08}"


@pytest.mark.parametrize(
    "planted, cause",
    [
        ("teacher_temperature: {start: 3, peak: 3}", "the teacher's temperature is too high"),
        ("centre_momentum: 0.99999", "targets are not centred, or the centre's momentum is too high"),
    ],
)
def test_a_planted_collapse_of_dino_names_its_cause(pretrain: Callable, tmp_path: Path, planted: str, cause: str) -> None:
    """Within 40 steps of 400."""
    dino = f"objectives.dino={{head: {HEAD}, crops: {{local_size: 8, num_local: 2}}, freeze_last_layer: 0, {planted}}}"
    options = ("teacher.momentum=0.9", "length=400", "optim.base_lr=2e-3", "batch_size=16", "health.images=24")
    watched = ("objectives.mae=null", "heldout.pictures=0", "heldout.every=999", "health.every=10", "health.on_alarm=stop")
    run = pretrain(tmp_path / "run", *watched, dino, *options)
    refused(run, cause)
    assert run.rows("health.jsonl")[-1]["step"] <= 40


@pytest.mark.parametrize(
    "trap, every, processes, engine, led",
    [
        (LATER, 1, 1, "ddp", 3),
        (LATER, 1, 2, "ddp", 3),
        (ALWAYS, 3, 1, "ddp", 2),  # the second goes back to before the first, whose images stay passed over
        pytest.param(LATER, 1, 1, "zero1", 3, marks=needs_deepspeed),
    ],
)
def test_a_run_is_set_back_and_sees_later_images(
    pretrain: Callable, tmp_path: Path, trap: str, every: int, processes: int, engine: str, led: int
) -> None:
    """Three times; then it stops. The step it goes back to is the newest before the signs; no image is seen twice."""
    options = ("health.on_alarm=rollback", f"checkpoint.every={every}", "checkpoint.keep_last=9", "data.ledger=true")
    settings = (*WATCHED, *options, f"launch.engine={engine}", "length=40")
    run = pretrain(tmp_path / "run", *settings, processes=processes, trap=trap)
    assert set(run.codes) == {2}, run.out + run.err
    back = [json.loads(line) for line in (tmp_path / "run/rollbacks.jsonl").read_text().splitlines()]
    assert len(back) == led and [row["times"] for row in back] == [1, 2, 3][-led:]
    assert all(row["skipped"] >= 8 * (row["at"] - row["step"]) > 0 for row in back)
    assert "the run was set back 3 times before" in run.out and "stopped at step" in run.err
    rows = [json.loads(line) for file in (tmp_path / "run/ledger").glob("*.jsonl") for line in file.read_text().splitlines()]
    positions = sorted(position for row in rows for position in row["positions"])
    assert len(set(positions)) == len(positions)
    assert positions[-1] + 1 == 8 * run.rows("health.jsonl")[-1]["step"] + sum(row["skipped"] for row in back)
