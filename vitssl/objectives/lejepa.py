"""LeJEPA: views agree with the mean of the large ones, and embeddings are normally distributed (Balestriero and LeCun 2025).

The surprising decision: nothing else keeps it from collapse, neither a teacher nor a stopped gradient; of a standard normal
distribution every projection is one, so a few hundred random directions a step are looked at instead of all.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from vitssl.config import Count
from vitssl.draws import fold, uniform
from vitssl.losses.agreement import squared_distance
from vitssl.losses.statistics import sigreg
from vitssl.models.mlp import mlp
from vitssl.models.spec import EncoderSpec
from vitssl.objectives.base import Nets, Objective
from vitssl.objectives.crops import LARGE, MultiCropConfig
from vitssl.plan import Stack
from vitssl.schedule import Clock
from vitssl.sections import Fraction, PhotometricConfig, Positive
from vitssl.task import Draw, Embeddings
from vitssl.views import View, purpose

COLOURS = PhotometricConfig(jitter=0.8, grey=0.2, blur=0.5, solarize=0.2)
"""Those of all views, README of the official code."""
CROPS = MultiCropConfig(scale=(0.3, 1.0), local_scale=(0.05, 0.3), num_local=6, first=COLOURS, second=COLOURS, local=COLOURS)
"""Two large and six small, README of the official code."""


class LeJEPA(Objective):
    """(1 - ``normality``) x the distance of all views to the mean of the large ones + ``normality`` x SIGReg of each view."""

    class Config(Objective.Config):
        normality: Fraction = Field(0.02, description="weight of SIGReg; the prediction has what is left (MINIMAL.md)")
        directions: Count = Field(1024, description="along which a step looks at the embeddings (README)")
        knots: int = Field(17, ge=2, description="points of the integral (README)")
        reach: Positive = Field(3.0, description="where the integral ends (official code)")
        hidden: Count = Field(2048, description="width of the projector's two hidden layers (MINIMAL.md)")
        out: Count = Field(128, description="width of the embeddings (MINIMAL.md)")
        pooling: Literal["mean", "class"] = Field("class", description="of the tokens, before the projector")
        crops: MultiCropConfig = CROPS

    couples_samples = True

    def __init__(self, config: Config, spec: EncoderSpec) -> None:
        super().__init__(config, spec)
        spec.refuse_pooling(config.pooling, "objectives.lejepa.pooling")
        self._stacks = config.crops.stacks(spec, where="objectives.lejepa.crops")
        self.projector = mlp([spec.dim, config.hidden, config.hidden, config.out])

    def views(self) -> dict[str, View]:
        return self.config.crops.views(self.spec)

    def stacks(self) -> list[Stack]:
        return self._stacks

    def embed(self, nets: Nets, views: dict[str, Tensor], draw: Draw) -> Embeddings:
        """Pooled tokens [B, D] of each view."""
        crops = self.config.crops
        pooled = [tokens.pool(self.config.pooling) for tokens in nets.student.together(crops.joined(views))]
        rows = [row for each, num in zip(pooled, (len(LARGE), crops.num_local), strict=False) for row in each.chunk(num)]
        return dict(zip((*LARGE, *crops.small), rows, strict=True))

    def compare(self, embeddings: Embeddings, targets: Embeddings, clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        """One BatchNorm sees the rows of all views, as in MINIMAL.md; the distribution is that of each view over all rows."""
        config = self.config
        views = torch.stack([embeddings[name] for name in (*LARGE, *config.crops.small)])  # [V, B, D]
        projected = self.projector(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        along = random_directions(config.out, config.directions, clock, device=projected.device)
        prediction = squared_distance(projected, projected[: len(LARGE)].mean(dim=0))
        statistics = sigreg(projected, along, reach=config.reach, knots=config.knots, total=self.total)
        terms = {"prediction": prediction, "sigreg": statistics.mean()}
        loss = (1 - config.normality) * terms["prediction"] + config.normality * terms["sigreg"]
        return loss, {name: term.detach() for name, term in {"loss": loss, **terms}.items()}


def random_directions(dim: int, num: int, clock: Clock, *, device: torch.device | str = "cpu") -> Tensor:
    """[dim, num] float64: directions of length 1, uniform over the sphere; others at every step, the same on every process."""
    seed = fold(clock.seed, clock.step)
    noise = uniform(seed, purpose("lejepa.directions"), torch.arange(dim, device=device), num)
    normal = torch.special.ndtri(noise.clamp(min=2.0**-54))  # 0 would be minus infinity
    return normal / normal.norm(dim=0)
