"""BYOL: of one view, predict what the encoder's average makes of the other; nothing is contrasted (Grill et al. 2020).

The surprising decision of the official code: the average's projector normalises by its own batch, so it stays in training mode.
"""

from pydantic import Field
from torch import Tensor

from vitssl.config import Count
from vitssl.losses.agreement import cosine_distance
from vitssl.models.mlp import mlp
from vitssl.models.spec import EncoderSpec
from vitssl.models.twin import Twin
from vitssl.objectives.pairs import PairObjective
from vitssl.schedule import Clock, Schedule
from vitssl.task import Embeddings


class BYOL(PairObjective):
    """Distance on the sphere, in both directions, summed. Samples meet in its BatchNorms alone, and need to."""

    class Config(PairObjective.Config):
        hidden: Count = Field(4096, description="width of the hidden layers of projector and predictor (section 3.3)")
        out: Count = Field(256, description="width of predictions and targets (section 3.3)")

    momentum = Schedule(0.996, final=1.0)

    def __init__(self, config: Config, spec: EncoderSpec) -> None:
        super().__init__(config, spec)
        self.projector = mlp([spec.dim, config.hidden, config.out], bias=False)
        self.predictor = mlp([config.out, config.hidden, config.out], bias=False)
        self.goals = Twin(self.projector, trains=True)

    def compare(self, embeddings: Embeddings, targets: Embeddings, clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        first, second = (self.predictor(self.projector(embeddings[name])) for name in ("first", "second"))
        first_goal, second_goal = (self.goals(targets[f"{name}_target"]) for name in ("first", "second"))
        loss = cosine_distance(first, second_goal) + cosine_distance(second, first_goal)
        return loss, {"loss": loss.detach()}
