"""SimCLR's loss against the official numbers (NTXentLoss of lightly): value and gradients, on one process and on two."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vitssl import dist
from vitssl.losses.contrast import nt_xent
from vitssl.models.spec import EncoderSpec
from vitssl.objectives.simclr import SimCLR
from vitssl.schedule import Clock

GOLDEN = Path(__file__).parents[1] / "golden" / "simclr"
TEMPERATURES = json.loads((GOLDEN / "meta.json").read_text())["config"]["temps"]
INPUTS, OUTPUTS = (load_file(GOLDEN / f"{name}.safetensors") for name in ("inputs", "outputs"))
SPEC = EncoderSpec(dim=8, depth=1, heads=2, patch=(4, 4), grid=(4, 4), prefix=1)
CLOCK = Clock(step=0, total=10, samples=0, seed=7)


def compared(temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, its gradients) of this process's contiguous share of the projections, as the official code divides them."""
    objective = SimCLR(SimCLR.Config(temperature=temperature), SPEC).train()
    objective.projector = nn.Identity()
    parts = [INPUTS[f"out{n}"].double().chunk(dist.world())[dist.rank()].clone().requires_grad_() for n in (0, 1)]
    loss, _ = objective.compare({"first": parts[0], "second": parts[1]}, {}, CLOCK)
    loss.backward()
    return loss.detach(), parts[0].grad, parts[1].grad


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_loss_and_gradients_on_one_process(temperature: float):
    names = ("loss", "grad_out0", "grad_out1")
    for name, found in zip(names, compared(temperature), strict=True):
        torch.testing.assert_close(found, OUTPUTS[f"T{temperature}.{name}"], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_loss_and_gradients_on_two(temperature: float, gang):
    """Each process's loss and gradient are the official ones: both gather with gradient, and DDP's mean sets the scale."""
    answers = [[torch.as_tensor(each) for each in answer] for answer in gang(2)(compared, temperature)]
    losses, *gradients = zip(*answers)
    torch.testing.assert_close(torch.stack(losses), OUTPUTS[f"T{temperature}.loss_2proc"], rtol=1e-11, atol=1e-14)
    for n, parts in enumerate(gradients):
        torch.testing.assert_close(torch.cat(parts), OUTPUTS[f"T{temperature}.grad_out{n}_2proc"], rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(torch.cat(parts) / 2, OUTPUTS[f"T{temperature}.grad_out{n}"], rtol=1e-11, atol=1e-14)


def test_without_gathering_it_would_be_another_loss():
    """What lightly computes by default, each process among its own rows: fewer negatives. Ours always gathers, since the
    loss of a batch may not depend on how many processes hold it."""
    halves = zip(*(INPUTS[f"out{n}"].double().chunk(2) for n in (0, 1)))
    own, temperature = torch.arange(4), TEMPERATURES[0]
    losses = torch.stack([nt_xent(a, b, a, b, own, temperature=temperature) for a, b in halves])
    torch.testing.assert_close(losses, OUTPUTS["nogather.loss_2proc"], rtol=1e-11, atol=1e-14)
    assert losses.mean() < 0.6 * OUTPUTS[f"T{temperature}.loss"]
