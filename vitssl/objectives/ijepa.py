"""Predicting features of hidden blocks from what is around them, in feature space alone (I-JEPA, Assran et al. 2023).

The surprising decision: no pixel is painted and no view compared. A teacher sees the whole image, the student a part of it, and
a predictor says what the teacher made of four blocks that the student was not shown.

Sizes of blocks are those of a whole step, as in the official code, so that sequences are of one length: here a function of
(seed, step). The length to which contexts are cut is one too: that of the shortest among ``shortest_of`` masks drawn for the
purpose, where the official code takes the shortest of a GPU's own, which would change with the number of GPUs. Of a thousand
images about eight have a context shorter still; patches that no target took complete it (``masks.multiblock.cut``).
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field, NonNegativeInt
from torch import Tensor

from vitssl.config import Count, Section
from vitssl.draws import fold, uniform
from vitssl.errors import ConfigError
from vitssl.losses.regression import smooth_l1
from vitssl.masks.multiblock import block_size, cut, multiblock
from vitssl.models.jepa import Predictor
from vitssl.models.spec import EncoderSpec
from vitssl.objectives.base import Nets, Objective
from vitssl.objectives.single import SingleConfig
from vitssl.plan import Stack
from vitssl.schedule import Clock, Schedule
from vitssl.sections import Area, Fraction, Positive, ascending
from vitssl.task import Draw
from vitssl.views import View, purpose

_SIZES, _OTHERS = purpose("ijepa.sizes"), purpose("ijepa.others")


class PredictorConfig(Section):
    """Assran et al. 2023, appendix A.1."""

    dim: Count = Field(384, description="width")
    depth: Count = Field(12, description="blocks")
    heads: Count | None = Field(None, description="attention heads; null: as many as the encoder has (official code)")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of the MLPs over the width")


class ViewConfig(SingleConfig):
    scale: Area = Field((0.3, 1.0), description="area of the crop, as a fraction of the image")
    flip: Fraction = Field(0.0, description="probability of a horizontal flip")


class IJEPA(Objective):
    """Smooth L1 between predictions and the teacher's normalised features of the target blocks."""

    class Config(Objective.Config):
        targets: Count = Field(4, description="target blocks of an image")
        target_scale: Area = Field((0.15, 0.2), description="area of a target block, as a fraction of the patches")
        aspect: Annotated[tuple[Positive, Positive], AfterValidator(ascending)] = Field(
            (0.75, 1.5), description="height over width of a target block"
        )
        context_scale: Area = Field((0.85, 1.0), description="area of the context block before targets are cut out")
        min_keep: NonNegativeInt = Field(10, description="a context has more patches than this")
        shortest_of: Count = Field(128, description="masks, drawn for each step, whose shortest context all are cut to")
        predictor: PredictorConfig = PredictorConfig()
        view: ViewConfig = ViewConfig()

    hides = True
    momentum = Schedule(0.996, final=1.0, shape="linear")
    judges_teacher = True

    def __init__(self, config: Config, spec: EncoderSpec) -> None:
        super().__init__(config, spec)
        spec.refuse_drops("objectives.ijepa")
        if min(spec.grid) < 2 or config.min_keep >= spec.num_patches:
            raise ConfigError(
                f"objectives.ijepa.min_keep={config.min_keep} of {spec.grid[0]}x{spec.grid[1]} patches: there must be more, and"
                " two down and across; take smaller patches or larger images"
            )
        own = config.predictor.model_dump()
        self.predictor = Predictor(spec, **own | {"heads": config.predictor.heads or spec.heads})

    def views(self) -> dict[str, View]:
        return self.config.view.views(self.spec.image_size)

    def forward(self, nets: Nets, views: dict[str, Tensor], clock: Clock, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """views["image"] [B, C, H, W] -> the loss, and itself as the only metric ``loss``."""
        target, context, length = self.sizes(clock)
        noise = draw("mask", 2 * (self.config.targets + 1))
        targets, *rest = multiblock(noise, self.spec.grid, target=target, context=context, num=self.config.targets)
        keep = cut(*rest, length)
        pred = self.predict(nets, views["image"], keep, targets)
        loss = smooth_l1(pred, self.features(nets, views["image"], targets))
        return loss, {"loss": loss.detach()}

    def predict(self, nets: Nets, images: Tensor, keep: Tensor, targets: Tensor) -> Tensor:
        """[B, M, n, D] at the places targets [B, M, n], from the patches keep [B, K]."""
        return self.predictor(nets.student(images, keep=keep).patches, keep, targets)

    def features(self, nets: Nets, images: Tensor, targets: Tensor) -> Tensor:
        """[B, M, n, D]: the teacher's of the whole image, each normalised (eps 1e-5, where the model's own norms have 1e-6)."""
        whole = nets.teacher(images).patches
        whole = F.layer_norm(whole, whole.shape[-1:])
        return whole.gather(1, targets.flatten(1)[..., None].expand(-1, -1, whole.shape[-1])).unflatten(1, targets.shape[1:])

    def sizes(self, clock: Clock) -> tuple[tuple[int, int], tuple[int, int], int]:
        """(height and width of target blocks, of the context block, patches of a context) of the step."""
        config, grid = self.config, self.spec.grid
        first, second = uniform(clock.seed, _SIZES, torch.tensor([clock.step]), 2)[0].tolist()
        target = block_size(first, grid, config.target_scale, config.aspect)
        context = block_size(second, grid, config.context_scale, (1.0, 1.0))
        others = torch.arange(config.shortest_of)  # on the CPU: a GPU would be waited for
        noise = uniform(clock.seed, fold(_OTHERS, clock.step), others, 2 * (config.targets + 1))
        _, contexts, _ = multiblock(noise, grid, target=target, context=context, num=config.targets)
        return target, context, max(int(contexts.sum(dim=1).min()), config.min_keep + 1)

    def stacks(self) -> list[Stack]:
        """Of the longest sequences among some steps."""
        spec, own = self.spec, self.config.predictor
        steps = [self.sizes(Clock(step, 1, 0, 0)) for step in range(20)]
        longest = max(length for _, _, length in steps)
        asked = max(length + target[0] * target[1] for target, _, length in steps)
        predictor = Stack(asked, own.dim, own.depth, own.heads or spec.heads, own.mlp_ratio)
        return [Stack(spec.prefix + longest, spec.dim, spec.depth, spec.heads)] + [predictor] * self.config.targets
