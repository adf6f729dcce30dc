"""A run whose samples meet in one loss: the same by parts, on two processes, and under DeepSpeed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from outcome import needs_deepspeed

SIMCLR = ("objectives.mae=null", "objectives.simclr={hidden: 16, out: 8, temperature: 0.5}", "heldout.pictures=0")
MOCO = ("objectives.mae=null", "objectives.moco_v3={hidden: 16, out: 8}", "heldout.pictures=0")


@pytest.fixture(scope="module")
def whole(pretrain: Callable, tmp_path_factory: pytest.TempPathFactory):
    return pretrain(tmp_path_factory.mktemp("whole") / "run", *SIMCLR, "micro_batch=8").ok()


@pytest.mark.parametrize(
    "own, processes",
    [
        (("micro_batch=2",), 1),
        (("micro_batch=2",), 2),
        pytest.param(("micro_batch=2", "launch.engine=zero2"), 2, marks=needs_deepspeed),
    ],
)
def test_parts_and_processes_train_the_same_run(whole, pretrain: Callable, tmp_path: Path, own, processes: int) -> None:
    run = pretrain(tmp_path / "run", *SIMCLR, *own, processes=processes).ok()
    np.testing.assert_allclose(run.losses(), whole.losses(), rtol=2e-4)
    assert whole.losses()[-1] < whole.losses()[0]
    assert "8 meet in one loss" in run.out and "goes forward twice" in run.out and "goes forward twice" not in whole.out


def test_a_teacher_is_kept_and_continued(pretrain: Callable, tmp_path: Path) -> None:
    """Its average is in the checkpoint, so a run that is set back goes on bit for bit."""
    run = pretrain(tmp_path / "run", *MOCO).ok()
    before, losses = run.tensors(), run.losses()
    name = "state/teacher.average.vit.blocks.0.attn.qkv.weight"
    assert (before[name] - before["state/encoder.vit.blocks.0.attn.qkv.weight"]).abs().max() > 0
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000020")
    again = pretrain(tmp_path / "run", *MOCO).ok()
    assert "from step 10" in again.out and again.losses() == losses
    assert all(tensor.equal(before[name]) for name, tensor in again.tensors().items())
