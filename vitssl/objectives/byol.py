"""BYOL: of one view, predict what the encoder's average makes of the other; nothing is contrasted (Grill et al. 2020).

The surprising decision of the official code: the average's projector normalises by its own batch, so it stays in training mode.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from vitssl.config import Count
from vitssl.losses.agreement import cosine_distance
from vitssl.models.encoder import EncoderSpec
from vitssl.models.mlp import mlp
from vitssl.models.twin import Twin
from vitssl.objectives.base import Nets, Objective
from vitssl.objectives.pairs import PairConfig
from vitssl.schedule import Clock, Schedule
from vitssl.task import Draw, Embeddings
from vitssl.views import View


class BYOL(Objective):
    """Distance on the sphere, in both directions, summed. Samples meet in its BatchNorms alone, and need to."""

    class Config(Objective.Config):
        hidden: Count = Field(4096, description="width of the hidden layers of projector and predictor (section 3.3)")
        out: Count = Field(256, description="width of predictions and targets (section 3.3)")
        pooling: Literal["mean", "class"] = Field("class", description="of the tokens, before the projector")
        pair: PairConfig = PairConfig()

    momentum = Schedule(0.996, final=1.0)
    couples_samples = True

    def __init__(self, config: Config, spec: EncoderSpec) -> None:
        super().__init__(config, spec)
        spec.refuse_pooling(config.pooling)
        self.projector = mlp([spec.dim, config.hidden, config.out], bias=False)
        self.predictor = mlp([config.out, config.hidden, config.out], bias=False)
        self.goals = Twin(self.projector, trains=True)

    def views(self) -> dict[str, View]:
        return self.config.pair.views(self.spec.image_size)

    def embed(self, nets: Nets, views: dict[str, Tensor], draw: Draw) -> Embeddings:
        """Pooled tokens [B, D] of each view."""
        return {name: nets.student(images).pool(self.config.pooling) for name, images in views.items()}

    def targets(self, nets: Nets, views: dict[str, Tensor], draw: Draw) -> Embeddings:
        """The teacher's pooled tokens [B, D] of each view."""
        return {f"{name}_goal": nets.teacher(images).pool(self.config.pooling) for name, images in views.items()}

    def compare(self, embeddings: Embeddings, targets: Embeddings, clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        first, second = (self.predictor(self.projector(embeddings[name])) for name in ("first", "second"))
        first_goal, second_goal = (self.goals(targets[f"{name}_goal"]) for name in ("first", "second"))
        loss = cosine_distance(first, second_goal) + cosine_distance(second, first_goal)
        return loss, {"loss": loss.detach()}
