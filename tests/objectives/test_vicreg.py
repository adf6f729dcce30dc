"""VICReg against the official code: loss and gradients for four settings of its weights, on one process and on two."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vitssl import dist
from vitssl.models.spec import EncoderSpec
from vitssl.objectives.vicreg import VICReg
from vitssl.schedule import Clock

GOLDEN = Path(__file__).parents[1] / "golden" / "vicreg"
WEIGHTS = json.loads((GOLDEN / "meta.json").read_text())["config"]["coeffs"]  # of invariance, variance, covariance
INPUTS, OUTPUTS = (load_file(GOLDEN / f"{name}.safetensors") for name in ("inputs", "outputs"))
SPEC = EncoderSpec(dim=8, depth=1, heads=2, patch=(4, 4), grid=(4, 4), prefix=1)
CLOCK = Clock(step=0, total=10, samples=0, seed=7)
CASES = pytest.mark.parametrize("case", range(len(WEIGHTS)))


def compared(case: int) -> dict[str, Tensor]:
    """Loss and gradients of this process's contiguous share of the embeddings, as the official code divides them."""
    weights = dict(zip(("invariance", "variance", "covariance"), WEIGHTS[case]))
    objective = VICReg(VICReg.Config(**weights, hidden=4, out=4), SPEC).train()
    objective.expander = nn.Identity()
    x, y = (INPUTS[name].double().chunk(dist.world())[dist.rank()].clone().requires_grad_() for name in "xy")
    loss, metrics = objective.compare({"first": x, "second": y}, {}, CLOCK)
    loss.backward()
    torch.testing.assert_close(sum(weights[name] * metrics[name] for name in weights), loss.detach())
    return {"loss": loss.detach(), "grad_x": x.grad, "grad_y": y.grad}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-11, atol=1e-13)


@CASES
def test_loss_and_gradients_on_one_process(case: int):
    for name, found in compared(case).items():
        close(found, OUTPUTS[f"one.c{case}.{name}"])


@CASES
def test_loss_and_gradients_on_two(case: int, gang):
    """Each process's are the official ones, and DDP's mean of them is that of one process."""
    answers = gang(2)(compared, case)
    for rank, answer in enumerate(answers):
        for name, found in answer.items():
            close(found, OUTPUTS[f"two.rank{rank}.c{case}.{name}"])
    for name in ("grad_x", "grad_y"):
        close(torch.cat([torch.as_tensor(answer[name]) for answer in answers]) / 2, OUTPUTS[f"one.c{case}.{name}"])
