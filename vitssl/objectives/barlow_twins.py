"""Barlow Twins: each number of one view follows the same number of the other, and no other one (Zbontar et al. 2021)."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from vitssl.config import Count
from vitssl.losses.statistics import cross_correlation
from vitssl.models.encoder import EncoderSpec
from vitssl.models.mlp import mlp
from vitssl.objectives.base import Nets, Objective
from vitssl.objectives.pairs import PairConfig
from vitssl.schedule import Clock
from vitssl.sections import Strength
from vitssl.task import Draw, Embeddings
from vitssl.views import View


class BarlowTwins(Objective):
    """The correlations of the two views over the whole batch, against the identity.

    The projector ends in the BatchNorm by which the numbers are standardised; one serves both views, as in the official code.
    """

    class Config(Objective.Config):
        redundancy: Strength = Field(0.0051, description="weight of the correlations of different numbers (official code)")
        hidden: Count = Field(8192, description="width of the projector's two hidden layers")
        out: Count = Field(8192, description="width of the projection")
        pooling: Literal["mean", "class"] = Field("class", description="of the tokens, before the projector")
        pair: PairConfig = PairConfig()

    couples_samples = True

    def __init__(self, config: Config, spec: EncoderSpec) -> None:
        super().__init__(config, spec)
        spec.refuse_pooling(config.pooling)
        self.projector = mlp([spec.dim, config.hidden, config.hidden, config.out], last="norm")

    def views(self) -> dict[str, View]:
        return self.config.pair.views(self.spec.image_size)

    def embed(self, nets: Nets, views: dict[str, Tensor], draw: Draw) -> Embeddings:
        """Pooled tokens [B, D] of each view."""
        return {name: nets.student(images).pool(self.config.pooling) for name, images in views.items()}

    def compare(self, embeddings: Embeddings, targets: Embeddings, clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        first, second = (self.all_rows(self.projector(embeddings[name])) for name in ("first", "second"))
        loss = cross_correlation(first, second, redundancy=self.config.redundancy)
        return loss, {"loss": loss.detach()}
