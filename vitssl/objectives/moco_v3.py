"""MoCo v3: a query of one view, its key among the keys of the other, made by the encoder's average (Chen et al. 2021).

The surprising decision of the official code: the average's projector normalises by its own batch, so it stays in training mode.
"""

import torch
from pydantic import Field
from torch import Tensor

from vitssl.config import Count
from vitssl.losses.contrast import info_nce
from vitssl.models.mlp import mlp
from vitssl.models.spec import EncoderSpec
from vitssl.models.twin import Twin
from vitssl.objectives.pairs import PairObjective
from vitssl.schedule import Clock, Schedule
from vitssl.sections import Positive
from vitssl.task import Embeddings


class MoCoV3(PairObjective):
    """InfoNCE in both directions, summed, each times twice the temperature."""

    class Config(PairObjective.Config):
        temperature: Positive = Field(0.2, description="of the logits (ViT; 1.0 for ResNets)")
        hidden: Count = Field(4096, description="width of the hidden layers of projector and predictor")
        out: Count = Field(256, description="width of queries and keys")

    momentum = Schedule(0.99, final=1.0)

    def __init__(self, config: Config, spec: EncoderSpec) -> None:
        super().__init__(config, spec)
        self.projector = mlp([spec.dim, config.hidden, config.hidden, config.out], last="norm")
        self.predictor = mlp([config.out, config.hidden, config.out], last="norm")
        self.keys = Twin(self.projector, trains=True)

    def compare(self, embeddings: Embeddings, targets: Embeddings, clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        queries = {name: self.predictor(self.projector(embeddings[name])) for name in ("first", "second")}
        with torch.no_grad():
            keys = {name: self.all_rows(self.keys(targets[f"{name}_target"])) for name in ("first", "second")}
        own, options = self.own_rows(queries["first"]), {"temperature": self.config.temperature}
        loss = info_nce(queries["first"], keys["second"], own, **options)
        loss = loss + info_nce(queries["second"], keys["first"], own, **options)
        return loss, {"loss": loss.detach()}
