"""SimCLR: of all views in the batch, which one is of the same image (Chen et al. 2020)."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from vitssl.config import Count
from vitssl.losses.contrast import nt_xent
from vitssl.models.mlp import mlp
from vitssl.models.spec import EncoderSpec
from vitssl.objectives.pairs import CropConfig, PairConfig, PairObjective
from vitssl.schedule import Clock
from vitssl.sections import PhotometricConfig, Positive
from vitssl.task import Embeddings

STRONG = CropConfig(
    photometric=PhotometricConfig(jitter=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, grey=0.2, blur=0.5)
)
"""Both views', Chen et al. 2020, appendix A."""


class SimCLR(PairObjective):
    """NT-Xent between the projections of two views; negatives are all other views of the whole batch."""

    class Config(PairObjective.Config):
        temperature: Positive = Field(0.1, description="of the logits (table 5 and appendix B.7)")
        hidden: Count = Field(2048, description="width of the projector's hidden layers")
        out: Count = Field(128, description="width of the projection")
        layers: Count = Field(2, description="of the projector (2: section 3; 3: SimCLR v2)")
        pooling: Literal["mean", "class"] = Field("mean", description="of the tokens, before the projector")
        pair: PairConfig = PairConfig(first=STRONG, second=STRONG)

    def __init__(self, config: Config, spec: EncoderSpec) -> None:
        super().__init__(config, spec)
        self.projector = mlp([spec.dim, *[config.hidden] * (config.layers - 1), config.out], last="scaled")

    def compare(self, embeddings: Embeddings, targets: Embeddings, clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        first, second = (self.projector(embeddings[name]) for name in ("first", "second"))
        everybody = self.all_rows(first), self.all_rows(second)
        loss = nt_xent(first, second, *everybody, self.own_rows(first), temperature=self.config.temperature)
        return loss, {"loss": loss.detach()}
