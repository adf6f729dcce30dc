"""Barlow Twins: each number of one view follows the same number of the other, and no other one (Zbontar et al. 2021)."""

from pydantic import Field
from torch import Tensor

from vitssl.config import Count
from vitssl.losses.statistics import cross_correlation
from vitssl.models.mlp import mlp
from vitssl.models.spec import EncoderSpec
from vitssl.objectives.pairs import PairObjective
from vitssl.schedule import Clock
from vitssl.sections import Strength
from vitssl.task import Embeddings


class BarlowTwins(PairObjective):
    """The correlations of the two views over the whole batch, against the identity.

    The projector ends in the BatchNorm by which the numbers are standardised; one serves both views, as in the official code.
    """

    class Config(PairObjective.Config):
        redundancy: Strength = Field(0.0051, description="weight of the correlations of different numbers (official code)")
        hidden: Count = Field(8192, description="width of the projector's two hidden layers")
        out: Count = Field(8192, description="width of the projection")

    def __init__(self, config: Config, spec: EncoderSpec) -> None:
        super().__init__(config, spec)
        self.projector = mlp([spec.dim, config.hidden, config.hidden, config.out], last="norm")

    def compare(self, embeddings: Embeddings, targets: Embeddings, clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        first, second = (self.all_rows(self.projector(embeddings[name])) for name in ("first", "second"))
        loss = cross_correlation(first, second, redundancy=self.config.redundancy)
        return loss, {"loss": loss.detach()}
