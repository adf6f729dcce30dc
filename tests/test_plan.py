"""The plan's arithmetic: batches that divide, rates, lengths, memory, and how it is shown and saved."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from vitssl.errors import ConfigError
from vitssl.plan import Plan, run_length, scaled_lr, split_batch, training_memory
from vitssl.schedule import Duration

PLAN = Plan(
    steps=12_500,
    epochs=300.0,
    samples=50_000,
    ignored=0,
    batch_size=1200,
    processes=4,
    micro_batch=100,
    accumulation=3,
    loss_batch=400,
    lr=7.03125e-4,
    lr_rule="0.00015 x 1200 / 256",
    warmup_steps=1667,
    engine="zero2",
    precision="bf16",
    device="cuda",
    workers=7,
    layouts=[[16, 1024, None]],
    parameters={"decay": 85_000_000, "no_decay": 120_000, "frozen": 151_296},
    memory={"parameters": 2**29, "activations (estimate)": 3 * 2**30},
)


@pytest.mark.parametrize(
    "batch_size, processes, micro_batch, fits, found",
    [
        (256, 1, None, None, (256, 1)),
        (256, 1, None, 100, (64, 4)),
        (256, 4, None, 1000, (64, 1)),
        (96, 2, None, 47, (24, 2)),
        (96, 2, None, 0, (1, 48)),
        (14, 2, None, 6, (1, 7)),
        (256, 4, 16, 1, (16, 4)),
        (4096, 64, 64, None, (64, 1)),
    ],
)
def test_split_batch(batch_size: int, processes: int, micro_batch: int | None, fits: int | None, found: tuple[int, int]):
    assert split_batch(batch_size, processes, micro_batch, fits=fits) == found


@pytest.mark.parametrize(
    "batch_size, processes, micro_batch, message",
    [
        (100, 3, None, "batch_size=100 does not divide over 3 processes (100 / 3 = 33.33); take 99 or 102"),
        (2, 3, None, "batch_size=2 does not divide over 3 processes (2 / 3 = 0.67); take 3"),
        (
            256,
            2,
            48,
            "micro_batch=48 does not divide a process's share: batch_size 256 / 2 processes = 128, 128 / 48 = 2.67;"
            " take 32 or 64",
        ),
        (8, 2, 5, "micro_batch=5 does not divide a process's share: batch_size 8 / 2 processes = 4, 4 / 5 = 0.80; take 2 or 4"),
    ],
)
def test_what_does_not_divide_is_shown_with_the_arithmetic(batch_size: int, processes: int, micro_batch: int | None, message):
    with pytest.raises(ConfigError) as error:
        split_batch(batch_size, processes, micro_batch)
    assert str(error.value) == message


@given(st.integers(1, 400), st.integers(1, 16), st.integers(-5, 500) | st.none())
def test_the_factors_make_the_batch_and_no_larger_one_fits(share: int, processes: int, fits: int | None):
    micro_batch, accumulation = split_batch(share * processes, processes, None, fits=fits)
    assert processes * micro_batch * accumulation == share * processes
    limit = share if fits is None else max(1, fits)
    assert micro_batch == max(size for size in range(1, share + 1) if share % size == 0 and size <= limit)


@given(st.integers(1, 500), st.integers(1, 16), st.integers(1, 64))
def test_a_batch_divides_or_is_refused(batch_size: int, processes: int, micro_batch: int):
    try:
        micro, accumulation = split_batch(batch_size, processes, micro_batch)
    except ConfigError:
        assert batch_size % (processes * micro_batch)
    else:
        assert (micro, processes * micro * accumulation) == (micro_batch, batch_size)


@pytest.mark.parametrize(
    "base_lr, rule, batch_size, lr, words",
    [
        (1.5e-4, "linear/256", 4096, 2.4e-3, "0.00015 x 4096 / 256"),
        (1e-3, "linear/256", 64, 2.5e-4, "0.001 x 64 / 256"),
        (4e-3, "sqrt/1024", 4096, 8e-3, "0.004 x sqrt(4096 / 1024)"),
        (3e-4, "none", 512, 3e-4, "0.0003, not scaled"),
    ],
)
def test_scaled_lr(base_lr: float, rule: str, batch_size: int, lr: float, words: str):
    found, arithmetic = scaled_lr(base_lr, rule, batch_size)
    assert (found, arithmetic) == (pytest.approx(lr, rel=1e-12), words)


@pytest.mark.parametrize(
    "length, samples, batch_size, steps",
    [("300ep", 1_281_167, 4096, 93_835), ("1ep", 100, 30, 3), ("0.5ep", 12_000, 256, 23), ("12_500", 10, 5, 12_500)],
)
def test_run_length(length: str, samples: int, batch_size: int, steps: int):
    assert run_length(Duration.parse(length), samples=samples, batch_size=batch_size) == steps


@pytest.mark.parametrize(
    "length, message",
    [
        ("1ep", "length=1ep is 0 steps of 256 over 100 images; nothing would be trained"),
        ("0", "length=0 is 0 steps of 256 over 100 images; nothing would be trained"),
        ("5%", "length=5% is a share of the run, and that is what it is to say; write epochs (300ep) or steps"),
    ],
)
def test_a_run_without_length(length: str, message: str):
    with pytest.raises(ConfigError) as error:
        run_length(Duration.parse(length), samples=100, batch_size=256)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "engine, parameters, gradients, optimiser",
    [("ddp", 440, 400, 800), ("zero1", 440 + 100, 400, 200), ("zero2", 440 + 100, 100, 200)],
)
def test_training_memory(engine: str, parameters: int, gradients: int, optimiser: int):
    """100 trainable and 10 frozen fp32 parameters on 4 processes; ZeRO keeps fp32 masters of its shard beside them."""
    found = training_memory(trainable=100, frozen=10, engine=engine, processes=4)
    assert found == {"parameters": parameters, "gradients": gradients, "optimiser": optimiser}
    assert training_memory(trainable=100, frozen=10, engine=engine, processes=4, moments=1)["optimiser"] == optimiser / 2


def test_the_plan_shows_every_number():
    lines = dict(PLAN.lines())
    assert lines == {
        "data": "50,000 images, 16 lanes, 7 loader processes each",
        "length": "12,500 steps = 300 epochs",
        "batch": "1200 = 4 x 100 x 3 (processes x micro-batch x accumulation), 400 meet in one loss",
        "lr": "0.0007031 (0.00015 x 1200 / 256), warm-up 1,667 steps from 0, then half cosine",
        "engine": "zero2, bf16, cuda",
        "rule decay": "85,000,000 parameters",
        "rule no_decay": "120,000 parameters",
        "rule frozen": "151,296 parameters",
        "memory": "parameters 512.0 MiB, activations (estimate) 3.00 GiB per process",
    }
    assert len(PLAN.lines()) == len(lines)


SHAPES = [
    ({}, "0, then half cosine"),
    ({"start_lr": 5e-7, "final_lr": 1e-6}, "5e-07, then half cosine to 1e-06"),
    ({"lr_shape": "linear"}, "0, then a line"),
    ({"lr_shape": "constant"}, "0, then constant"),
    ({"lr_shape": "multistep", "milestones": [9000], "gamma": 0.1}, "0, then x 0.1 at step 9,000"),
    (
        {"lr_shape": "multistep", "milestones": [9000, 12_500], "gamma": 0.5},
        "0, then x 0.5 at step 9,000 and 12,500 (beyond the run)",
    ),
]


@pytest.mark.parametrize("changes, words", SHAPES)
def test_how_the_rate_moves_is_shown_and_done(changes: dict, words: str):
    plan = dataclasses.replace(PLAN, **changes)
    assert dict(plan.lines())["lr"].endswith(f"warm-up 1,667 steps from {words}")
    schedule = plan.lr_schedule()
    assert (schedule.at(0), schedule.at(1667)) == (plan.start_lr, plan.lr)
    half = plan.lr * {"constant": 1.0, "multistep": plan.gamma}.get(plan.lr_shape, 0.0) + plan.final_lr
    assert schedule.at(12_499) == pytest.approx(half, abs=1e-6)


def test_a_changing_decay_is_shown():
    plan = dataclasses.replace(PLAN, weight_decay=0.04, final_weight_decay=0.4)
    assert dict(plan.lines())["decay"] == "0.04 to 0.4 along a half cosine"
    assert len(plan.lines()) == len(PLAN.lines()) + 1


def test_the_plan_is_saved_whole(tmp_path: Path):
    PLAN.save(tmp_path / "plan.json")
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert saved == dataclasses.asdict(PLAN) and Plan(**saved) == PLAN


def test_the_plans_schedule():
    schedule = dataclasses.replace(PLAN, final_lr=1e-6).lr_schedule()
    assert schedule.at(0) == 0
    assert schedule.at(PLAN.warmup_steps) == PLAN.lr
    assert schedule.at(PLAN.steps) == pytest.approx(1e-6)
    assert math.isclose(PLAN.steps_per_epoch, 50_000 / 1200)


@pytest.mark.parametrize("final", [0.4, 0.0])
def test_the_decay_is_dinos(final: float):
    """Its ``cosine_scheduler`` without warm-up, whose last value is the one before ``final``; nothing else moves it."""
    plan = dataclasses.replace(PLAN, weight_decay=0.04, final_weight_decay=final, steps=200)
    found = [plan.decay_schedule().at(step) for step in range(200)]
    if final:
        official = load_file(Path(__file__).parent / "golden/dino/outputs.safetensors")["sched.wd_official_defaults"]
        assert found == pytest.approx(official.tolist(), rel=1e-12)
    assert found[0] == pytest.approx(0.04) and abs(found[-1] - final) < 1e-4
    still = dataclasses.replace(plan, final_weight_decay=None).decay_schedule()
    assert {still.at(step) for step in (0, 100, 200)} == {0.04}  # exactly
