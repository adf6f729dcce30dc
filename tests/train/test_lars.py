"""LARS: MoCo v3's own three steps of a whole model, and a slow oracle."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vitssl.draws import uniform
from vitssl.lars import LARS
from vitssl.models.encoder import Encoder
from vitssl.objectives import create
from vitssl.objectives.mixture import Mixture
from vitssl.schedule import Clock
from vitssl.sections import OptimConfig
from vitssl.train.optim import build_optimizer, set_rates

GOLDEN = Path(__file__).parents[1] / "golden/moco_v3"
SETTINGS = json.loads((GOLDEN / "meta.json").read_text())["config"]
PLACES = (  # official -> ours
    ("base_encoder.head.", "objectives.moco_v3.projector."),
    ("base_encoder.", "encoder.vit."),
    ("momentum_encoder.head.", "objectives.moco_v3.keys.average."),
    ("momentum_encoder.", "teacher.average.vit."),
    ("predictor.", "objectives.moco_v3.predictor."),
)


def ours(name: str) -> str:
    official, place = next(pair for pair in PLACES if name.startswith(pair[0]))
    return place + name.removeprefix(official)


def moco() -> Mixture:
    """The official model, in float64."""
    arguments = {"embed_dim": SETTINGS["dim"], "depth": SETTINGS["depth"], "num_heads": SETTINGS["heads"], "mlp_ratio": 2.0}
    sizes = {"image_size": SETTINGS["img"], "patch_size": SETTINGS["patch"]}
    encoder = Encoder.create("vit_tiny_patch16_224", **sizes, arguments=arguments)
    heads = {"hidden": SETTINGS["mlp_dim"], "out": SETTINGS["moco_dim"], "temperature": SETTINGS["T"]}
    parts = {"moco_v3": create("moco_v3", heads, encoder.spec)}
    task = Mixture(encoder, parts, mean=(0.5,) * 3, std=(0.5,) * 3).double()
    state = {ours(name): tensor for name, tensor in load_file(GOLDEN / "weights.safetensors").items()}
    fixed = {name: task.state_dict()[name] for name in ("normalize.mean", "normalize.std") if name in task.state_dict()}
    task.load_state_dict(state | fixed, strict=True)
    for part in ("pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        encoder.vit.get_parameter(part).requires_grad_(False)
    return task.train()


def test_the_three_steps_of_moco_v3() -> None:
    """Its average moves before the keys are made, ours after the step: the same, one step apart."""
    task, own = moco(), SETTINGS["lars"]
    config = OptimConfig(name="lars", momentum=own["momentum"], weight_decay=own["wd"])
    optimizer = build_optimizer(task, config, lr=own["lr"], device=torch.device("cpu"))
    set_rates(optimizer, lr=own["lr"], weight_decay=own["wd"])
    inputs, official = load_file(GOLDEN / "inputs.safetensors"), load_file(GOLDEN / "outputs.safetensors")
    objective = task.objectives["moco_v3"]
    for step in range(own["steps"]):
        task.teacher.update(SETTINGS["m"])
        objective.keys.update(SETTINGS["m"])
        views = {name: inputs[key][step].double() for name, key in (("first", "lars_x1"), ("second", "lars_x2"))}
        loss, _ = objective(task._nets, views, Clock(0, 9, 0, 0), lambda name, num: uniform(0, 0, torch.arange(8), num))
        torch.testing.assert_close(loss.detach(), official["lars.loss"][step], rtol=1e-9, atol=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state, compared = task.state_dict(), 0
    for name, tensor in official.items():
        if name.startswith("lars_params/") and "num_batches" not in name:
            found = state[ours(name.removeprefix("lars_params/"))]
            torch.testing.assert_close(found, tensor, rtol=1e-9, atol=1e-12, msg=name)
            compared += 1
    assert compared > 50


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_by_a_slow_oracle(decay: float) -> None:
    """Matrices are scaled, vectors are not; what has no gradient or no size is left as it is, or not scaled."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (3, 4), "token": (1, 1, 4), "vector": (5,), "zero": (2, 2), "idle": (2, 2)}
    own = {name: nn.Parameter(torch.randn(shape, generator=generator).double()) for name, shape in shapes.items()}
    own["zero"].data.zero_()
    expected = {name: (parameter.detach().clone(), torch.zeros_like(parameter)) for name, parameter in own.items()}
    optimizer = LARS([{"params": list(own.values()), "weight_decay": decay}], lr=0.1, momentum=0.5, trust=0.02)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        for name in (name for name in own if name != "idle"):
            weights, ball = expected[name]
            own[name].grad = torch.randn(shapes[name], generator=generator).double()
            update = own[name].grad + decay * weights
            scale = 0.02 * weights.norm() / update.norm() if name != "vector" and weights.norm() else 1.0
            ball = 0.5 * ball + scale * update
            expected[name] = (weights - 0.1 / (step + 1) * ball, ball)
        optimizer.step()
    for name, parameter in own.items():
        torch.testing.assert_close(parameter.detach(), expected[name][0], rtol=1e-12, atol=1e-14)
    assert torch.equal(own["idle"], expected["idle"][0])
