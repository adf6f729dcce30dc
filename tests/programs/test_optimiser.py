"""Keys of ``optim:`` in real runs: they do what they say, go on bit for bit, and mean the same on several processes."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

LAST_WAITS = """
from vitssl.objectives.mae import MAE
from vitssl.schedule import Duration
from vitssl.task import Rule, decay_rules
last = r"decoder\\.predict\\..*"
MAE.param_rules = lambda self: [Rule("last", last, waits=Duration(5, "steps")), *decay_rules(f"(?!{last}$).*")]
"""
STEPS = ("length=8", "optim.warmup=2", "checkpoint.every=4", "checkpoint.keep_last=9", "heldout.every=8")

SETTINGS = {
    "clip": ("optim.clip=0.02", "optim.clip_by=parameter"),
    "wait": (),
    "layers": ("optim.layer_decay=0.5", "optim.patch_lr=0.2", "optim.decay=all", "optim.clip=0.02", "optim.clip_by=module"),
    "steps": ("optim.shape=multistep", "optim.milestones=[3, 50%]", "optim.start_lr=0.002"),
    "lars": ("optim.name=lars", "optim.base_lr=5", "optim.trust=0.01"),
    "decay": ("optim.weight_decay=0.1", "optim.final_weight_decay=20.0"),
}


@pytest.fixture(scope="module", params=SETTINGS)
def whole(request: pytest.FixtureRequest, pretrain: Callable, tmp_path_factory: pytest.TempPathFactory):
    """(settings, their run of eight steps)."""
    settings, options = SETTINGS[request.param], {"trap": LAST_WAITS if request.param == "wait" else None}
    run = pretrain(tmp_path_factory.mktemp("whole") / "run", *STEPS, *settings, **options).ok()
    return (settings, options), run


def test_it_is_another_run(whole, exported) -> None:
    assert whole[1].losses() != exported.losses()[:8]


def test_it_goes_on_bit_for_bit(pretrain: Callable, whole, tmp_path: Path) -> None:
    (settings, options), before = whole
    shutil.copytree(before.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000008")
    run = pretrain(tmp_path / "run", *STEPS, *settings, **options).ok()
    assert "from step 4" in run.out and run.losses() == before.losses()
    assert all(torch.equal(tensor, before.tensors()[name]) for name, tensor in run.tensors().items())


def test_two_processes_train_the_same(pretrain: Callable, whole, tmp_path: Path) -> None:
    (settings, options), before = whole
    run = pretrain(tmp_path / "run", *STEPS, *settings, **options, processes=2).ok()
    np.testing.assert_allclose(run.losses(), before.losses(), rtol=1e-5)


def test_the_decay_is_written_where_it_changes(pretrain: Callable, exported, tmp_path: Path) -> None:
    run = pretrain(tmp_path / "run", *STEPS, *SETTINGS["decay"], "log.every=4").ok()
    assert [row["weight_decay"] for row in run.rows() if "lr" in row] == pytest.approx(
        [20 - 19.9 * (1 + math.cos(math.pi * step / 8)) / 2 for step in (3, 7)]
    )
    assert not any("weight_decay" in row for row in exported.rows())
    assert "0.1 to 20 along a half cosine" in run.out


def test_a_rule_that_waits_is_in_the_checkpoint(pretrain: Callable, tmp_path: Path) -> None:
    """It keeps its values over the first five steps, and its updates are counted from there."""
    run = pretrain(tmp_path / "run", *STEPS, "checkpoint.every=1", trap=LAST_WAITS).ok()
    assert "5 steps in which mae.last keeps its weights" in run.out
    last, beside = (f"state/objectives.mae.decoder.{name}.weight" for name in ("predict", "norm"))
    for step in range(2, 9):
        now, before = run.tensors(step - 1), run.tensors(step - 2)
        assert now[last].equal(before[last]) == (step <= 5) and not now[beside].equal(before[beside])
        facts = json.loads((run.checkpoints()[step - 1] / "manifest.json").read_text())["facts"]
        assert facts["waiting"] == {"mae.last": {"steps": 5, "updates": max(0, step - 5)}} and facts["updates"] == step
