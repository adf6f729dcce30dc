"""Distillation without labels: a frozen teacher says what its tokens of an image are, or of which classes it is.

Any encoder that a run could begin from teaches its class token, its patch tokens or both; any classifier of timm or of ours
teaches its soft labels, a CNN such as BiT or RegNet too (Beyer et al. 2022: of the very crop the student sees, and for long).
The teacher is no part of the state: a run that goes on loads it again from where its config says.
"""

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vitssl.config import Section
from vitssl.errors import ConfigError
from vitssl.losses.classes import distillation
from vitssl.losses.tokens import token_distance
from vitssl.models.encoder import Tokens
from vitssl.models.positions import Grid
from vitssl.models.spec import EncoderSpec, Pooling
from vitssl.models.teacher import Aside, Teacher
from vitssl.objectives.base import Nets, Objective
from vitssl.objectives.single import SingleConfig
from vitssl.schedule import Clock
from vitssl.sections import Positive, Size
from vitssl.task import Draw
from vitssl.views import View

Target = Literal["tokens", "class", "patches", "labels"]


class TeacherConfig(Section):
    """Who teaches."""

    name: str = Field(
        description="an encoder as for init.weights (a run, an official file, timm:TAG, hf:FOLDER); for target=labels a timm"
        " model, a folder with its config.json, or a fine-tuned run of ours"
    )
    weights: Path | None = Field(None, description="its file, for a timm model by name; null: those that timm fetches")
    image_size: Size | None = Field(None, description="pixels it is shown; null: those that it was trained at")


class Distill(Objective):
    """How far a linear layer on the student's tokens is from the teacher's tokens, or a linear classifier from its labels."""

    class Config(Objective.Config):
        teacher: TeacherConfig
        target: Target = Field("tokens", description="what is learnt; tokens: class and patches, their distances added")
        loss: Literal["cosine", "smooth_l1"] = Field("cosine", description="between tokens")
        temperature: Positive = Field(1.0, description="that divides both's logits, of target=labels")
        pooling: Pooling = Field("class", description="of the student's tokens, for the class token and for labels")
        view: SingleConfig = SingleConfig(scale=(0.2, 1.0))

    taught = True

    def __init__(self, config: Config, spec: EncoderSpec, teacher: Teacher) -> None:
        super().__init__(config, spec)
        if teacher.channels != spec.channels:
            raise ConfigError(
                f"objectives.distill.teacher.name={config.teacher.name}: looks at {teacher.channels} channels, and"
                f" encoder.channels={spec.channels}"
            )
        if config.target != "patches":
            spec.refuse_pooling(config.pooling, "objectives.distill.pooling")
        self.teacher = Aside(teacher)
        names = ["class", "patches"] if config.target == "tokens" else [config.target]
        width = teacher.num_classes if config.target == "labels" else teacher.network.spec.dim
        self.heads = nn.ModuleDict({name: nn.Linear(spec.dim, width) for name in names})

    def views(self) -> dict[str, View]:
        return self.config.view.views(self.spec.image_size)

    def companions(self) -> list[nn.Module]:
        return [self.teacher.network]

    def forward(self, nets: Nets, views: dict[str, Tensor], clock: Clock, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """views["image"] [B, C, H, W] -> the loss; metrics: itself, its parts, and for labels how many first choices agree."""
        tokens, answer = nets.student(views["image"]), self.teacher(nets.restore(views["image"]).to(views["image"].dtype))
        if self.config.target == "labels":
            logits = self.heads["labels"](tokens.pool(self.config.pooling))
            # of a sample and not of each of its classes: else a teacher of 1,000 would weigh a thousandth in a mixture
            loss = distillation(logits, answer, kind="soft", temperature=self.config.temperature) * logits.shape[-1]
            agreed = (logits.detach().argmax(-1) == answer.argmax(-1)).to(loss.dtype).mean()
            return loss, {"loss": loss.detach(), "agreement": agreed}
        parts = {
            name: token_distance(head(self._own(tokens, name)), self._target(answer, name), kind=self.config.loss)
            for name, head in self.heads.items()
        }
        loss = sum(parts.values())
        return loss, {"loss": loss.detach()} | {name: part.detach() for name, part in parts.items()}

    def _own(self, tokens: Tokens, name: str) -> Tensor:
        return tokens.patches if name == "patches" else tokens.pool(self.config.pooling)

    def _target(self, answer: Tokens, name: str) -> Tensor:
        """The teacher's class token (where it has none: the mean over its patches), or its patches on the student's grid."""
        if name == "class":
            return answer.pool("mean" if answer.cls is None else "class")
        teacher = self.teacher.network
        grid = tuple(side // patch for side, patch in zip(teacher.size, teacher.network.spec.patch))
        return regrid(answer.patches, grid, self.spec.grid)


def regrid(tokens: Tensor, from_grid: Grid, to_grid: Grid) -> Tensor:
    """[B, N, D] of patches in raster order -> [B, M, D] of another grid, bilinear and smoothed where it shrinks; in fp32."""
    if from_grid == to_grid:
        return tokens
    image = tokens.to(torch.promote_types(tokens.dtype, torch.float32)).unflatten(1, from_grid).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=to_grid, mode="bilinear", align_corners=False, antialias=True)
    return image.permute(0, 2, 3, 1).flatten(1, 2)
