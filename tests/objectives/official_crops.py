"""The official numbers of DINO, iBOT and DINOv2, and our objectives in their place."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vitssl.models.encoder import Encoder
from vitssl.models.prototypes import PrototypeHead
from vitssl.models.spec import EncoderSpec
from vitssl.models.twin import Twin
from vitssl.objectives import create
from vitssl.objectives.base import Objective
from vitssl.objectives.mixture import Mixture
from vitssl.schedule import Clock

SPEC = EncoderSpec(dim=16, depth=2, heads=2, patch=(4, 4), grid=(4, 4), prefix=1)
START = Clock(step=0, total=10, samples=0, seed=7)


class Golden:
    """A folder of ``tests/golden``."""

    def __init__(self, name: str) -> None:
        folder = Path(__file__).parents[1] / "golden" / name
        self.config = json.loads((folder / "meta.json").read_text())["config"]
        self.tables = json.loads((folder / "tables.json").read_text())
        self.weights, self.inputs, self.outputs = (
            load_file(folder / f"{part}.safetensors") for part in ("weights", "inputs", "outputs")
        )

    def given(self, name: str, *index: int) -> Tensor:
        return self.inputs[name][index].double()

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.outputs.items() if key.startswith(prefix)}


def temperature(value: float) -> dict[str, float]:
    return {"start": value, "peak": value}


def of_logits(method: str, prototypes: int, settings: dict[str, Any]) -> Objective:
    """An objective whose rows are the logits themselves: its prototypes are the axes, for students and teachers."""
    head = {"prototypes": prototypes, "hidden": 4, "bottleneck": prototypes}
    objective = create(method, {"head": head, "crops": {"local_size": 8}} | settings, SPEC).double().train()
    for part in objective.modules():
        if isinstance(part, PrototypeHead):
            part.last_layer.weight_v.data.copy_(torch.eye(prototypes))
    return objective


def official_task(golden: Golden, method: str, settings: dict[str, Any]) -> Mixture:
    """The tiny official student and teacher as a mixture of one, in float64."""
    own = golden.config
    arguments = {"embed_dim": own["dim"], "depth": own["depth"], "num_heads": own["heads"], "mlp_ratio": own["mlp_ratio"]}
    sizes = {"image_size": own["img"], "patch_size": own["patch"]}
    encoder = Encoder.create("vit_tiny_patch16_224", **sizes, pos_resample="dino", arguments=arguments)
    head = {"prototypes": own["head"]["out_dim"], "hidden": own["head"]["hidden_dim"]}
    head |= {"bottleneck": own["head"]["bottleneck_dim"], "layers": own["head"]["nlayers"]}
    crops = {"local_size": own["local_px"], "num_local": own["locals"]}
    objective = create(method, {"head": head | settings.pop("head", {}), "crops": crops} | settings, encoder.spec)
    task = Mixture(encoder, {method: objective}, mean=(0.5,) * 3, std=(0.5,) * 3)
    found = dict(task.named_parameters())
    for name, value in golden.weights.items():
        if "last_layer2" not in name:  # iBOT's is the same module twice
            found.pop(ours(name, method)).data.copy_(value)
    assert not found
    for part in task.modules():
        if isinstance(part, PrototypeHead) and objective.config.head.fixed_norm:
            part.last_layer.weight_g.data.fill_(1.0)
    return task.double().train()


def ours(name: str, method: str) -> str:
    """An official name, ``student.`` or ``teacher.`` before it (else the student's), in our task."""
    who, _, rest = name.rpartition(re.search(r"(backbone|head)\.", name)[0])
    part = name.removeprefix(who)
    teacher = who == "teacher."
    if part == "backbone.masked_embed":
        return f"objectives.{method}.mask_token"
    if part.startswith("backbone."):
        return ("teacher.average.vit." if teacher else "encoder.vit.") + rest
    return f"objectives.{method}." + ("teacher_head.average." if teacher else "head.") + rest


def views_of(golden: Golden, large: Tensor, small: Tensor) -> dict[str, Tensor]:
    """Crops [crop, B, C, H, W] under our names."""
    names = ["first", "second", *(f"local_{index}" for index in range(golden.config["locals"]))]
    return {name: crop.double() for name, crop in zip(names, [*large, *small], strict=True)}


def restart(task: Mixture) -> None:
    for part in task.modules():
        if isinstance(part, Twin):
            part.restart()


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Equal to ``tolerance`` relative to the largest entry."""
    atol = tolerance * max(float(expected.abs().max()), 1e-30)
    torch.testing.assert_close(torch.as_tensor(found).detach(), expected, rtol=0, atol=atol)
