"""Barlow Twins against the official code: loss, gradients and running statistics, on one process and on two."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from vitssl import dist
from vitssl.losses.statistics import cross_correlation
from vitssl.models.norms import BatchNorm
from vitssl.models.spec import EncoderSpec
from vitssl.objectives.barlow_twins import BarlowTwins
from vitssl.schedule import Clock

GOLDEN = Path(__file__).parents[1] / "golden" / "barlow_twins"
META = json.loads((GOLDEN / "meta.json").read_text())["config"]
INPUTS, OUTPUTS = (load_file(GOLDEN / f"{name}.safetensors") for name in ("inputs", "outputs"))
SPEC = EncoderSpec(dim=8, depth=1, heads=2, patch=(4, 4), grid=(4, 4), prefix=1)
CLOCK = Clock(step=0, total=10, samples=0, seed=7)


def compared() -> dict[str, Tensor]:
    """Of this process's share of the projections: what the last BatchNorm and the loss make of it."""
    objective = BarlowTwins(BarlowTwins.Config(redundancy=META["lambd"], hidden=4, out=META["d"]), SPEC).double().train()
    objective.projector = objective.projector[-1:]
    x, y = (INPUTS[name].double().chunk(dist.world())[dist.rank()].clone().requires_grad_() for name in "xy")
    loss, _ = objective.compare({"first": x, "second": y}, {}, CLOCK)
    loss.backward()
    norm = objective.projector[0]
    running = {"running_mean": norm.running_mean, "running_var": norm.running_var}
    return {"loss": loss.detach(), "grad_x": x.grad, "grad_y": y.grad, **running}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-10, atol=1e-12)


def test_the_default_weight_is_the_official_one():
    assert BarlowTwins.Config().redundancy == META["lambd"]


def test_loss_gradients_and_running_statistics():
    """Both views move the statistics of the one BatchNorm."""
    for name, found in compared().items():
        close(found, OUTPUTS[f"one.{name}"])


def test_two_processes_are_one(gang):
    """Official training synchronises its BatchNorm, so the numbers of one process are the reference; there DDP's mean would
    then halve the gradient, since each process has only the part of its own rows. Here each has twice that part."""
    answers = gang(2)(compared)
    for answer in answers:
        for name in ("loss", "running_mean", "running_var"):
            close(answer[name], OUTPUTS[f"one.{name}"])
    for name in ("grad_x", "grad_y"):
        close(torch.cat([torch.as_tensor(answer[name]) for answer in answers]) / 2, OUTPUTS[f"one.{name}"])


def test_with_batchnorms_of_their_own_two_processes_have_another_loss():
    """By hand, the official numbers of halves that are standardised by themselves; ours never are."""
    parts = [INPUTS[name].double().requires_grad_() for name in "xy"]
    norms = [BatchNorm(META["d"], affine=False).double() for _ in range(2)]
    halves = [torch.cat([norm(half) for norm, half in zip(norms, each.chunk(2))]) for each in parts]
    loss = cross_correlation(*halves, redundancy=META["lambd"])
    loss.backward()
    for rank, norm in enumerate(norms):
        found = {"loss": loss.detach(), "running_mean": norm.running_mean, "running_var": norm.running_var}
        found |= {f"grad_{name}": each.grad.chunk(2)[rank] for name, each in zip("xy", parts)}
        for name, value in found.items():
            close(value, OUTPUTS[f"two.rank{rank}.{name}"])
    assert (loss.detach() - OUTPUTS["one.loss"]).abs() > 0.04
