"""Two augmented views of every image, and what methods that compare them have in common: all but the heads and the loss."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from vitssl.config import Section
from vitssl.models.spec import EncoderSpec
from vitssl.objectives.base import Nets, Objective
from vitssl.plan import Stack
from vitssl.sections import Area, Fraction, PhotometricConfig
from vitssl.task import Draw, Embeddings
from vitssl.views import Photometric, View

COLOURS = PhotometricConfig(jitter=0.8, grey=0.2, blur=1.0)
"""The first view's in BYOL (Grill et al. 2020, appendix B), MoCo v3, Barlow Twins and VICReg."""
SECOND = COLOURS.model_copy(update={"blur": 0.1, "solarize": 0.2})
HALF = PhotometricConfig(jitter=0.8, saturation=0.4, grey=0.2, blur=0.5)
"""SimCLR's at half of their strength: those of CAN, of CMAE's target and, in its official code, of MSN."""


class CropConfig(Section):
    """A random resized crop and what is done to its colours; the size is the encoder's."""

    scale: Area = Field((0.08, 1.0), description="area of the crop, as a fraction of the image")
    flip: Fraction = Field(0.5, description="probability of a horizontal flip")
    interpolation: Literal["bicubic", "bilinear"] = Field("bicubic", description="of the resize")
    photometric: PhotometricConfig = COLOURS

    def view(self, size: tuple[int, int], *, copy: int = 0) -> View:
        """The view of ``size`` (height, width); ``copy`` tells apart those that differ in their draws alone."""
        values = self.model_dump()
        return View(size=size, copy=copy, **values | {"photometric": Photometric(**values["photometric"])})


class PairConfig(Section):
    """The two views of a pair."""

    first: CropConfig = CropConfig()
    second: CropConfig = CropConfig(photometric=SECOND)

    def views(self, size: tuple[int, int]) -> dict[str, View]:
        """By the names ``first`` and ``second``."""
        return {"first": self.first.view(size), "second": self.second.view(size, copy=1)}


class PairObjective(Objective):
    """Embeddings ``first`` and ``second`` [B, D]: the pooled tokens of two views, which subclasses compare.

    Where a teacher is kept, its pooled tokens are the targets ``first_target`` and ``second_target``.
    """

    class Config(Objective.Config):
        pooling: Literal["mean", "class"] = Field("class", description="of the tokens, before the projector")
        pair: PairConfig = PairConfig()

    couples_samples = True

    def __init__(self, config: Config, spec: EncoderSpec) -> None:
        super().__init__(config, spec)
        spec.refuse_pooling(config.pooling, f"objectives.{self.name}.pooling")

    def views(self) -> dict[str, View]:
        return self.config.pair.views(self.spec.image_size)

    def embed(self, nets: Nets, views: dict[str, Tensor], draw: Draw) -> Embeddings:
        first, second = nets.student(_both(views)).pool(self.config.pooling).chunk(2)
        return {"first": first, "second": second}

    def targets(self, nets: Nets, views: dict[str, Tensor], draw: Draw) -> Embeddings:
        if self.momentum is None:
            return {}
        first, second = nets.teacher(_both(views)).pool(self.config.pooling).chunk(2)
        return {"first_target": first, "second_target": second}

    def stacks(self) -> list[Stack]:
        return 2 * super().stacks()


def _both(views: dict[str, Tensor]) -> Tensor:
    """[2B, C, H, W]: both views in one pass."""
    return torch.cat([views["first"], views["second"]])
