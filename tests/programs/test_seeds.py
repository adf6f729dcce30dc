"""Several seeds: each an ordinary run, resumable, in any number of processes; and Student's interval by scipy's numbers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from outcome import needs_deepspeed
from scipy import stats

from finetune.seeds import summary, t_quantile

SHORT = ("length=4", "checkpoint.every=2", "checkpoint.keep_last=9", "test.every=100%", "labelled=16")


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 10, 30, 101])
def test_the_quantile_is_students(freedom: int):
    assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


def test_the_interval_of_a_mean():
    values = np.random.default_rng(0).normal(size=5).tolist()
    found = summary(values)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (found["low"], found["high"]) == pytest.approx((low, high), rel=1e-9)
    assert found["deviation"] == pytest.approx(np.std(values, ddof=1)) and found["values"] == values


def test_each_seed_is_an_ordinary_run_and_their_numbers_are_summed_up(finetune: Callable, tmp_path: Path) -> None:
    run = finetune(tmp_path / "run", "seeds=2", *SHORT).ok()
    alone = finetune(tmp_path / "alone", "seed=1", *SHORT).ok()
    rows = [json.loads(line) for line in (tmp_path / "run-seed1/metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == alone.losses()
    lasts = [json.loads((tmp_path / f"run-seed{seed}/probes.jsonl").read_text().splitlines()[-1]) for seed in (0, 1)]
    assert lasts[1] == alone.rows("probes.jsonl")[-1] and lasts[0]["loss"] != lasts[1]["loss"]
    found = json.loads((tmp_path / "run/results/seeds.json").read_text())
    assert found["seeds"] == [0, 1] and found["runs"] == [str(tmp_path / f"run-seed{seed}") for seed in (0, 1)]
    assert found["measures"]["loss"] == summary([last["loss"] for last in lasts])
    assert f"{found['measures']['loss']['mean']:.4f} +- " in run.out and "2 seeds: mean and its 95 % interval" in run.out
    shutil.rmtree(tmp_path / "run-seed1/checkpoints/step_00000004")
    again = finetune(tmp_path / "run", "seeds=3", *SHORT).ok()
    assert "run-seed0 is finished: step 4 of 4" in again.out and "run-seed1 from step 2" in again.out
    more = json.loads((tmp_path / "run/results/seeds.json").read_text())
    assert more["measures"]["loss"]["values"][:2] == found["measures"]["loss"]["values"] and more["seeds"] == [0, 1, 2]


@pytest.mark.parametrize("engine", ["ddp", pytest.param("zero1", marks=needs_deepspeed)])
def test_in_two_processes(finetune: Callable, tmp_path: Path, engine: str) -> None:
    calm = ("seeds=2", "seed=5", "drop_path=0", *SHORT)
    one = finetune(tmp_path / "one", *calm).ok()
    two = finetune(tmp_path / "two", *calm, f"launch.engine={engine}", processes=2).ok()
    ours, theirs = (json.loads((run.folder / "results/seeds.json").read_text()) for run in (one, two))
    assert ours["seeds"] == theirs["seeds"] == [5, 6]
    np.testing.assert_allclose(theirs["measures"]["loss"]["values"], ours["measures"]["loss"]["values"], rtol=1e-5)


def test_a_plan(finetune: Callable, tmp_path: Path) -> None:
    run = finetune(tmp_path / "run", "seeds=2", "--plan").ok()
    assert run.out.count("plan") == 1 and not list(tmp_path.iterdir())
