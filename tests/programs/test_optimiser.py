"""Keys of ``optim:`` in real runs: they do what they say, go on bit for bit, and mean the same on several processes."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

STEPS = ("length=8", "optim.warmup=2", "checkpoint.every=4", "checkpoint.keep_last=9", "heldout.every=8")

SETTINGS = {
    "clip": ("optim.clip=0.02", "optim.clip_by=parameter"),
    "decay": ("optim.weight_decay=0.1", "optim.final_weight_decay=20.0"),
}


@pytest.fixture(scope="module", params=SETTINGS)
def whole(request: pytest.FixtureRequest, pretrain: Callable, tmp_path_factory: pytest.TempPathFactory):
    """(settings, their run of eight steps)."""
    settings = SETTINGS[request.param]
    return settings, pretrain(tmp_path_factory.mktemp("whole") / "run", *STEPS, *settings).ok()


def test_it_is_another_run(whole, exported) -> None:
    assert whole[1].losses() != exported.losses()[:8]


def test_it_goes_on_bit_for_bit(pretrain: Callable, whole, tmp_path: Path) -> None:
    settings, before = whole
    shutil.copytree(before.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000008")
    run = pretrain(tmp_path / "run", *STEPS, *settings).ok()
    assert "from step 4" in run.out and run.losses() == before.losses()
    assert all(torch.equal(tensor, before.tensors()[name]) for name, tensor in run.tensors().items())


def test_two_processes_train_the_same(pretrain: Callable, whole, tmp_path: Path) -> None:
    settings, before = whole
    run = pretrain(tmp_path / "run", *STEPS, *settings, processes=2).ok()
    np.testing.assert_allclose(run.losses(), before.losses(), rtol=1e-5)


def test_the_decay_is_written_where_it_changes(pretrain: Callable, exported, tmp_path: Path) -> None:
    run = pretrain(tmp_path / "run", *STEPS, *SETTINGS["decay"], "log.every=4").ok()
    assert [row["weight_decay"] for row in run.rows() if "lr" in row] == pytest.approx(
        [20 - 19.9 * (1 + math.cos(math.pi * step / 8)) / 2 for step in (3, 7)]
    )
    assert not any("weight_decay" in row for row in exported.rows())
    assert "0.1 to 20 along a half cosine" in run.out
