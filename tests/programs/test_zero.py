"""DeepSpeed on two CPU processes: it really runs, trains as DDP does, and its checkpoints are everyone's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from outcome import WAIT, equal_bits, needs_deepspeed
from safetensors.torch import load_file

pytestmark = needs_deepspeed

SPY = """
from vitssl.train.launch import Engine
real = Engine.prepare
def prepare(self, *arguments, **options):
    real(self, *arguments, **options)
    wrapped = self.wrapped
    stage = getattr(wrapped, "zero_optimization_stage", lambda: None)()
    print("engine", self.kind, type(wrapped).__name__, stage, getattr(wrapped, "world_size", None))
Engine.prepare = prepare
"""
STEPS = ("checkpoint.every=5", "checkpoint.keep_last=9")


@pytest.fixture(scope="module")
def zero2(pretrain: Callable, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("zero2") / "run"
    return pretrain(folder, *STEPS, "launch.engine=zero2", processes=2, trap=SPY).ok()


def test_the_engine_is_deepspeeds_and_equals_ddp(zero2, exported) -> None:
    assert all("engine deepspeed DeepSpeedEngine 2 2" in out.read_text() for out, _ in zero2.files)
    np.testing.assert_allclose(zero2.losses(), exported.losses(), rtol=1e-5)
    ours, theirs = zero2.rows()[-1], exported.rows()[-1]
    assert ours["lr"] == theirs["lr"] and ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_its_checkpoint_holds_what_ddps_holds(zero2, exported) -> None:
    ours, theirs = zero2.tensors(), exported.tensors()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == torch.float32 and tensor.shape == theirs[name].shape, name
    drift = max(float((ours[name] - theirs[name]).abs().max()) for name in ours if name.startswith("state/"))
    assert drift < 1e-2  # the key biases' gradients are rounding, which AdamW turns into whole steps
    assert all(ours[name].abs().max() > 0 for name in ours if name.startswith("moments/"))


def test_its_export_is_timms(zero2) -> None:
    facts = json.loads((zero2.folder / "export/encoder.json").read_text())
    model = timm.create_model(facts["architecture"], **facts["arguments"])
    state = load_file(zero2.folder / "export/encoder.safetensors")
    assert tuple(model.load_state_dict(state, strict=True)) == ([], [])


@pytest.mark.parametrize(
    ("begun", "engine", "processes"),
    [("zero2", "zero2", 2), ("zero2", "ddp", 1), ("zero2", "zero1", 2), ("exported", "zero2", 2)],
)
def test_one_engine_goes_on_from_anothers_checkpoint(
    pretrain: Callable, request: pytest.FixtureRequest, tmp_path: Path, begun: str, engine: str, processes: int
) -> None:
    before = request.getfixturevalue(begun)
    shutil.copytree(before.folder, tmp_path / "run")
    for step in (15, 20):
        shutil.rmtree(tmp_path / f"run/checkpoints/step_{step:08}")
    run = pretrain(tmp_path / "run", *STEPS, f"launch.engine={engine}", processes=processes, trap=SPY).ok()
    kind = "single Mixture" if engine == "ddp" else f"deepspeed DeepSpeedEngine {engine[-1]} {processes}"
    assert f"engine {kind}" in run.out and "from step 10" in run.out
    assert run.losses()[:10] == before.losses()[:10]
    np.testing.assert_allclose(run.losses()[10:], before.losses()[10:], rtol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        (["launch.engine=zero1"], 1e-5),
        (["launch.engine=zero2", "micro_batch=2"], 1e-5),
        (["launch.engine=zero2", "optim.clip=0.1"], 1e-5),
        (["launch.engine=zero2", "optim.weight_decay=0.1", "optim.final_weight_decay=20"], 1e-5),
        (["launch.engine=zero2", "launch.precision=bf16"], 5e-3),
    ],
    ids=["zero1", "accumulated", "clipped", "decayed", "bf16"],
)
def test_it_equals_ddp_in_every_setting(pretrain: Callable, tmp_path: Path, overrides: list[str], tolerance: float) -> None:
    ours = pretrain(tmp_path / "zero", *overrides, processes=2, trap=SPY).ok()
    assert f"DeepSpeedEngine {overrides[0][-1]}" in ours.out
    theirs = pretrain(tmp_path / "ddp", *overrides[1:]).ok()
    np.testing.assert_allclose(ours.losses(), theirs.losses(), rtol=tolerance)


def test_a_single_process_is_enough(pretrain: Callable, tmp_path: Path, exported) -> None:
    run = pretrain(tmp_path / "run", "launch.engine=zero2", "length=20", trap=SPY).ok()
    assert "DeepSpeedEngine 2 1" in run.out
    np.testing.assert_allclose(run.losses(), exported.losses(), rtol=1e-5)


def test_the_encoder_waits_under_it_too(pretrain: Callable, waited, exported, tmp_path: Path) -> None:
    """Bit for bit, with moments that begin afterwards; and on from the middle of one process's."""
    options, given = (*WAIT, f"init.weights={exported.folder}"), load_file(exported.folder / "export/encoder.safetensors")
    run = pretrain(tmp_path / "run", *options, "launch.engine=zero2", processes=2).ok()
    for step in (6, 7):
        ours, theirs = run.tensors(step - 1), waited.tensors(step - 1)
        assert ours.keys() == theirs.keys() and equal_bits(ours, given) == (step == 6)
        for name in (name for name in ours if name.startswith("moments/exp_avg_sq/encoder.")):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-9, msg=name)
            assert ours[name].any() == (step == 7)
    np.testing.assert_allclose(run.losses(), waited.losses(), rtol=1e-5)
    shutil.copytree(waited.folder, tmp_path / "again")
    for step in range(4, 11):
        shutil.rmtree(tmp_path / f"again/checkpoints/step_{step:08}")
    on = pretrain(tmp_path / "again", *options, "launch.engine=zero1", processes=2, trap=SPY).ok()
    assert "DeepSpeedEngine 1 2" in on.out and "from step 3" in on.out
    assert equal_bits(on.tensors(5), given) and not equal_bits(on.tensors(6), given)
    np.testing.assert_allclose(on.losses(), waited.losses(), rtol=1e-5)


def test_sgd_and_an_average_under_it_equal_ddp_and_go_on(finetune: Callable, tmp_path: Path) -> None:
    """One moment, two parameter groups, fewer parameters trained than there are; and on from its checkpoint under DDP."""
    sgd = ("optim.name=sgd", "optim.base_lr=0.03", "optim.layer_decay=null", "optim.clip=1.0", "mode=partial", "blocks=1")
    recipe = (*sgd, "ema=0.5", "drop_path=0", "checkpoint.keep_last=9")
    one = finetune(tmp_path / "one", *recipe).ok()
    two = finetune(tmp_path / "two", *recipe, "launch.engine=zero2", processes=2, trap=SPY).ok()
    assert "DeepSpeedEngine 2 2" in two.out
    np.testing.assert_allclose(two.losses(), one.losses(), rtol=1e-5)
    ours, theirs = two.tensors(), one.tensors()
    assert ours.keys() == theirs.keys() and any(name.startswith("moments/momentum_buffer/") for name in ours)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5, msg=name)
    for begun, then in ((two, "ddp"), (one, "zero1")):
        folder = tmp_path / f"on_{then}"
        shutil.copytree(begun.folder, folder)
        shutil.rmtree(folder / "checkpoints/step_00000012")
        on = finetune(folder, *recipe, f"launch.engine={then}", processes=1 if then == "ddp" else 2).ok()
        assert "from step 6" in on.out
        np.testing.assert_allclose(on.losses(), one.losses(), rtol=1e-5)


def test_fine_tuning_runs_under_it(finetune: Callable, tmp_path: Path) -> None:
    one = finetune(tmp_path / "one").ok()
    two = finetune(tmp_path / "two", "launch.engine=zero2", processes=2, trap=SPY).ok()
    assert "DeepSpeedEngine 2 2" in two.out
    # mixing and drop path are drawn per process: the first step, whose head is zero, and the evaluation are comparable
    assert two.losses()[0] == pytest.approx(one.losses()[0], rel=1e-6)
    assert two.rows("probes.jsonl")[-1]["images"] == 16
