"""Multi-crop: two large crops of every image and several small ones (SwAV, Caron et al. 2020, section 3.2)."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from vitssl.config import Section
from vitssl.models.spec import EncoderSpec
from vitssl.objectives.pairs import COLOURS, SECOND, CropConfig
from vitssl.plan import Stack
from vitssl.sections import Area, Fraction, PhotometricConfig, Size
from vitssl.views import View

LARGE = ("first", "second")
LOCAL = COLOURS.model_copy(update={"blur": 0.5})
"""The small crops' colours in DINO's official code."""


class MultiCropConfig(Section):
    """Two large crops, of the encoder's size, and ``num_local`` small ones; the defaults are those of DINO's official code."""

    scale: Area = Field((0.4, 1.0), description="area of a large crop, as a fraction of the image")
    local_scale: Area = Field((0.05, 0.4), description="area of a small crop, as a fraction of the image")
    num_local: NonNegativeInt = Field(8, description="small crops of each image")
    local_size: Size = Field(96, description="pixels of a small crop, one number or [height, width]; its patches divide it")
    flip: Fraction = Field(0.5, description="probability of a horizontal flip")
    interpolation: Literal["bicubic", "bilinear"] = Field("bicubic", description="of the resize")
    first: PhotometricConfig = COLOURS
    second: PhotometricConfig = SECOND
    local: PhotometricConfig = LOCAL

    def views(self, spec: EncoderSpec) -> dict[str, View]:
        """By the names ``first``, ``second``, ``local_0``, ..."""

        def view(size: tuple[int, int], scale: tuple[float, float], colours: PhotometricConfig, copy: int) -> View:
            crop = CropConfig(scale=scale, flip=self.flip, interpolation=self.interpolation, photometric=colours)
            return crop.view(size, copy=copy)

        found = {"first": view(spec.image_size, self.scale, self.first, 0)}
        found["second"] = view(spec.image_size, self.scale, self.second, 1)
        for copy, name in enumerate(self.small, start=2):
            found[name] = view(self._size, self.local_scale, self.local, copy)
        return found

    def joined(self, views: Mapping[str, Tensor]) -> list[Tensor]:
        """The crops of each size, joined: what passes through the encoder together."""
        return [joined(views, names) for names in (LARGE, self.small) if names]

    @property
    def small(self) -> list[str]:
        """The names of the small crops."""
        return [f"local_{index}" for index in range(self.num_local)]

    def stacks(self, spec: EncoderSpec, *, where: str) -> list[Stack]:
        """What all crops of a sample pass through. Raises ConfigError for a size that patches do not divide."""
        if self.num_local:
            spec.refuse_size(self._size, f"{where}.local_size:")
        rows, columns = (side // patch for side, patch in zip(self._size, spec.patch))
        tokens = [spec.num_patches] * len(LARGE) + [rows * columns] * self.num_local
        return [Stack(spec.prefix + each, spec.dim, spec.depth, spec.heads) for each in tokens]

    @property
    def _size(self) -> tuple[int, int]:
        return (self.local_size, self.local_size) if isinstance(self.local_size, int) else self.local_size


def joined(views: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """[V x B, C, H, W]: crops of one size for one pass through the encoder, all of the first name, then of the next."""
    return torch.cat([views[name] for name in names])


def by_sample(rows: Tensor, num: int) -> Tensor:
    """[V x B, ...] in that order -> [B, V, ...]."""
    return rows.unflatten(0, (num, -1)).transpose(0, 1)
