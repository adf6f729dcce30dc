"""VICReg: two views agree, every number varies, and no two of them vary together (Bardes, Ponce and LeCun 2022).

The surprising decision of the official code: the variances of the two views are averaged, their covariances are summed.
"""

from pydantic import Field
from torch import Tensor

from vitssl.config import Count
from vitssl.losses.agreement import squared_distance
from vitssl.losses.statistics import covariance_penalty, variance_hinge
from vitssl.models.mlp import mlp
from vitssl.models.spec import EncoderSpec
from vitssl.objectives.pairs import PairObjective
from vitssl.schedule import Clock
from vitssl.sections import Strength
from vitssl.task import Embeddings


class VICReg(PairObjective):
    """Invariance from row to row, variance and covariance over the rows of the whole batch."""

    class Config(PairObjective.Config):
        invariance: Strength = Field(25.0, description="weight of the squared distance of the two views")
        variance: Strength = Field(25.0, description="weight of how far deviations are below 1")
        covariance: Strength = Field(1.0, description="weight of the squared covariances")
        hidden: Count = Field(8192, description="width of the expander's two hidden layers")
        out: Count = Field(8192, description="width of the embeddings")

    def __init__(self, config: Config, spec: EncoderSpec) -> None:
        super().__init__(config, spec)
        self.expander = mlp([spec.dim, config.hidden, config.hidden, config.out], bias=False)

    def compare(self, embeddings: Embeddings, targets: Embeddings, clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        views = [self.expander(embeddings[name]) for name in ("first", "second")]
        batch = [self.all_rows(rows) for rows in views]
        terms = {
            "invariance": squared_distance(*views),
            "variance": sum(variance_hinge(rows) for rows in batch) / 2,
            "covariance": sum(covariance_penalty(rows) for rows in batch),
        }
        loss = sum(getattr(self.config, name) * term for name, term in terms.items())
        return loss, {name: term.detach() for name, term in {"loss": loss, **terms}.items()}
