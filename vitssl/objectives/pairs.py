"""Two augmented views of every image, as contrastive methods take them."""

from typing import Literal

from pydantic import Field

from vitssl.config import Section
from vitssl.sections import Area, Fraction, PhotometricConfig
from vitssl.views import Photometric, View

COLOURS = PhotometricConfig(jitter=0.8, grey=0.2, blur=1.0)
"""The first view's in BYOL (Grill et al. 2020, appendix B), MoCo v3, Barlow Twins and VICReg."""
SECOND = COLOURS.model_copy(update={"blur": 0.1, "solarize": 0.2})


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
