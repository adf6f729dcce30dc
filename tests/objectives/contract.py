"""What every objective is held to, and the small settings under which: one row a method, or a way of using it."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitssl import dist
from vitssl.models.encoder import Encoder
from vitssl.models.teacher import Teacher
from vitssl.models.twin import Twin
from vitssl.objectives import create
from vitssl.objectives.mixture import Mixture
from vitssl.schedule import Clock
from vitssl.task import Batch
from vitssl.train.steps import exact_step, mean_step

CLOCK = Clock(step=3, total=20, samples=48, seed=5)
ROWS = 16  # of the whole batch


@dataclass(frozen=True)
class Case:
    """Settings of the objectives of one small run. ``frozen``: trainable parameters that may have no gradient, and why."""

    objectives: dict[str, dict[str, Any]]
    encoder: dict[str, Any] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)  # pattern of names -> reason
    tolerance: float = 1e-9  # of gradients in float64, relative to the largest of a parameter


PAIR_HEADS = {"hidden": 24, "out": 8}
HEAD = {"prototypes": 12, "hidden": 24, "bottleneck": 8}
CROPS = {"local_size": 8, "num_local": 2}
DINOV2 = {"centring": "sinkhorn", "koleo": 0.1, "koleo_group": 8, "masks": {"min_area": 1}, "crops": CROPS}

PAINTER = {"decoder": {"dim": 16, "depth": 1, "heads": 2}}

CASES = {
    "data2vec": Case({"data2vec": {"blocks": 2, "min_block": 2}}),
    "ijepa": Case({"ijepa": {"min_keep": 2, "shortest_of": 4, "predictor": {"dim": 16, "depth": 1}}}),
    "patch_prediction": Case({"patch_prediction": {"bits": 2}}),
    "mae": Case({"mae": PAINTER}),
    "mae in blocks, a part painted": Case(
        {"mae": {"block": 2, "decode": 0.25, "decoder": PAINTER["decoder"] | {"positions": "learned"}}}
    ),
    "mae that looks across": Case({"mae": {"decode": 0.5, "decoder": PAINTER["decoder"] | {"attention": "cross"}}}),
    "mae that looks across at all blocks": Case(
        {"mae": {"decoder": PAINTER["decoder"] | {"attention": "cross", "mixing": True}}},
        frozen={r"encoder\.vit\.norm\.": "the loss looks before it"},
    ),
    "can": Case({"can": PAINTER | {"out": 8}}),
    "can without noise, with BatchNorm": Case({"can": PAINTER | {"denoising": 0, "norm": True, "decode": 0.5}}),
    "cmae": Case({"cmae": PAINTER | PAIR_HEADS | {"shift": 4}}),
    "distill": Case({"distill": {"teacher": {"name": "tokens"}}}),
    "distill smaller patches by smooth L1": Case(
        {"distill": {"teacher": {"name": "larger"}, "target": "patches", "loss": "smooth_l1"}}
    ),
    "distill labels": Case({"distill": {"teacher": {"name": "labels"}, "target": "labels", "pooling": "mean"}}),
    "simclr": Case({"simclr": PAIR_HEADS}),
    "simmim": Case({"simmim": {"mask_unit": 8}}),
    "simmim without norm": Case(
        {"simmim": {"mask_unit": 4, "final_norm": False}}, frozen={r"encoder\.vit\.norm\.": "the loss looks before it"}
    ),
    "dino": Case({"dino": {"head": HEAD, "crops": CROPS}}),
    "ibot": Case({"ibot": {"head": HEAD | {"fixed_norm": False}, "crops": CROPS}}),
    "dinov2": Case(
        {"ibot": DINOV2 | {"head": HEAD, "patch_head": HEAD | {"prototypes": 10}}},
        encoder={"registers": 2, "arguments": {"embed_dim": 16, "depth": 2, "num_heads": 2, "init_values": 0.1}},
    ),
    "dinov2 with centres": Case({"ibot": DINOV2 | {"head": HEAD, "centring": "mean", "centred_on": "masked"}}),
    "msn": Case(
        {"msn": PAIR_HEADS | {"prototypes": 12, "crops": CROPS}},
        encoder={"pos_resample": "mae"},  # timm's rule resamples the gradient of learned positions in fp32
    ),
    "msn without Sinkhorn and small crops": Case(
        {"msn": PAIR_HEADS | {"prototypes": 12, "sinkhorn": False, "mask_ratio": 0.5, "crops": {"num_local": 0}}}
    ),
    "moco_v3": Case({"moco_v3": PAIR_HEADS}),
    "byol": Case({"byol": PAIR_HEADS}),
    "vicreg": Case({"vicreg": PAIR_HEADS}),
    "barlow_twins": Case({"barlow_twins": PAIR_HEADS}),
    "lejepa": Case(
        {"lejepa": PAIR_HEADS | {"directions": 16, "crops": {"local_size": 8, "num_local": 2}}},
        encoder={"positions": "sincos"},  # the gradient of learned ones is resampled in fp32
    ),
    "mae + moco_v3": Case({"mae": PAINTER | {"weight": 0.5}, "moco_v3": PAIR_HEADS}),
}


class Wide(Mixture):
    """A mixture that shows its views in float64, where its networks are."""

    def _shown(self, *args: Any, **options: Any) -> Iterator[tuple[str, Any, dict[str, Tensor]]]:
        kind = next(self.encoder.parameters()).dtype
        for name, objective, views in super()._shown(*args, **options):
            yield name, objective, {role: images.to(kind) for role, images in views.items()}


def teacher_of(settings: dict[str, Any]) -> Teacher | None:
    """A small teacher by the name that settings give it: other images, patches, widths and statistics than the student's."""
    name = settings.get("teacher", {}).get("name")
    if name is None:
        return None
    known = {"mean": (0.4,) * 3, "std": (0.3,) * 3}
    if name == "labels":
        cnn = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
        return Teacher(cnn, **known, size=(16, 16), num_classes=5)
    size, patch = {"tokens": (16, 4), "larger": (24, 4)}[name]
    shape = {"embed_dim": 12, "depth": 1, "num_heads": 2}
    encoder = Encoder.create("vit_tiny_patch16_224", image_size=size, patch_size=patch, arguments=shape)
    return Teacher(encoder, **known, size=(size, size))


def build(case: str, *, dtype: torch.dtype = torch.float64) -> Wide:
    """The task of a case, the same at every call. Teachers stand a little beside their students."""
    torch.manual_seed(0)
    chosen = CASES[case]
    arguments = {"embed_dim": 16, "depth": 2, "num_heads": 2}
    settings = {"image_size": 16, "patch_size": 4, "arguments": arguments} | chosen.encoder
    encoder = Encoder.create("vit_tiny_patch16_224", **settings)
    parts = {name: create(name, own, encoder.spec, teacher=teacher_of(own)) for name, own in chosen.objectives.items()}
    task = Wide(encoder, parts, mean=(0.5,) * 3, std=(0.25,) * 3).to(dtype)
    for part in task.modules():
        if isinstance(part, Twin):
            with torch.no_grad():
                for parameter in part.average.parameters():
                    parameter += 0.02 * torch.randn_like(parameter)
    return task


def batch(task: Mixture, rows: slice = slice(None), *, num: int = ROWS) -> Batch:
    """Those rows of the one batch that all cases see; a view's images follow from its size and copy alone."""
    views = {}
    for view in sorted(task.views):
        generator = torch.Generator().manual_seed(31 * view.size[0] + view.copy)
        views[view] = torch.randint(0, 256, (num, 3, *view.size), dtype=torch.uint8, generator=generator)[rows]
    return Batch(views, torch.arange(num)[rows] + 48)


class Plainly:
    """An engine of nothing: what ``train.steps`` asks of one, on this process's own."""

    loss_scale = 1.0

    def __init__(self, task: Mixture, accumulation: int) -> None:
        self.task, self.accumulation = task, accumulation

    def seed_step(self, clock: Clock, *parts: int) -> None:
        torch.manual_seed(sum(parts))

    def micro_step(self, *, last: bool) -> nullcontext:
        return nullcontext()

    def forward(self, batch: Batch | None, clock: Clock, **options: Any) -> Any:
        return self.task(batch, clock, **options)

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()


def gradients(task: nn.Module) -> dict[str, Tensor]:
    """By name, of the parameters that train; zeros where there is none."""
    named = {name: p for name, p in task.named_parameters() if p.requires_grad}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()}


def step_of_process(case: str, parts: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """(loss, gradients averaged as DDP does, state after the step) of this process's rows in ``parts`` micro-batches."""
    task = build(case).train()
    own = range(dist.rank(), ROWS, dist.world())
    size = len(own) // parts
    batches = [batch(task, list(own[first : first + size])) for first in range(0, len(own), size)]
    step = exact_step if task.couples_samples and parts > 1 else mean_step
    sums = step(Plainly(task, parts), CLOCK, batches)
    task.after_step(CLOCK)
    found = {name: dist.sum_over_processes(each) / dist.world() for name, each in gradients(task).items()}
    loss = dist.sum_over_processes(sums["loss"].double()) / dist.world()
    return loss, found, {name: value for name, value in task.state_dict().items() if "running" in name or "centre" in name}
