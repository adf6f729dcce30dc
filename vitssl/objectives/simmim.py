"""Painting large holes from what is around them: the plainest masked image modelling (SimMIM, Xie et al. 2022).

The surprising decision: there is no decoder. All patches go through the encoder, the masked ones as one learned token, and a
single linear layer makes pixels of its output; what makes that hard is that holes are wider than patches.
"""

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from vitssl.config import Count
from vitssl.errors import ConfigError
from vitssl.losses.pixels import patchify, unpatchify
from vitssl.losses.regression import masked_l1
from vitssl.masks.units import unit_masks
from vitssl.models.init import narrow_normal
from vitssl.models.spec import EncoderSpec
from vitssl.objectives.base import Nets, Objective
from vitssl.objectives.mae import Reconstruction
from vitssl.objectives.single import SingleConfig
from vitssl.schedule import Clock
from vitssl.sections import Area
from vitssl.task import Draw
from vitssl.views import View


class ViewConfig(SingleConfig):
    scale: Area = Field((0.67, 1.0), description="area of the crop, as a fraction of the image")


class SimMIM(Objective):
    """Mean absolute error of the masked pixels, which are normalised as the encoder's input is and not per patch."""

    class Config(Objective.Config):
        mask_ratio: float = Field(0.6, gt=0, lt=1, description="fraction of units masked, rounded up")
        mask_unit: Count = Field(32, description="side of a masked square in pixels; patches divide it, it divides the image")
        final_norm: bool = Field(True, description="paint from normalised tokens; false: from the last block's, as Swin does")
        view: ViewConfig = ViewConfig()

    hides = True

    def __init__(self, config: Config, spec: EncoderSpec) -> None:
        super().__init__(config, spec)
        unit, size = config.mask_unit, spec.image_size
        if any(unit % patch or side % unit for patch, side in zip(spec.patch, size)):
            raise ConfigError(
                f"objectives.simmim.mask_unit={unit} pixels: patches of {spec.patch[0]}x{spec.patch[1]} must divide it, and it"
                f" an image of {size[0]}x{size[1]}; {_that_fit(spec)}"
            )
        self.units = size[0] // unit, size[1] // unit
        self.num_units = self.units[0] * self.units[1]
        self.num_masked = math.ceil(self.num_units * config.mask_ratio)
        if self.num_masked == self.num_units:
            raise ConfigError(
                f"objectives.simmim.mask_ratio={config.mask_ratio} masks all of {self.num_units} units; take at most"
                f" {1 - 1 / self.num_units:.4g} or a smaller mask_unit"
            )
        self.mask_token = nn.Parameter(torch.empty(1, 1, spec.dim))  # 3-D as in the official code, where it is weight-decayed
        narrow_normal(self.mask_token)
        self.paint = nn.Linear(spec.dim, spec.patch[0] * spec.patch[1] * spec.channels)

    def views(self) -> dict[str, View]:
        return self.config.view.views(self.spec.image_size)

    def forward(self, nets: Nets, views: dict[str, Tensor], clock: Clock, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """views["image"] [B, C, H, W] -> the loss, and itself as the only metric ``loss``."""
        images, mask = views["image"], self._masks(draw)
        loss = masked_l1(self.predict(nets, images, mask), patchify(images, self.spec.patch, channels_first=True), mask)
        return loss, {"loss": loss.detach()}

    def predict(self, nets: Nets, images: Tensor, mask: Tensor) -> Tensor:
        """[B, N, P]: pixels of all patches, each in the order (channel, row, column); mask [B, N] bool."""
        tokens = nets.student(images, mask=mask, mask_token=self.mask_token, last_blocks=int(not self.config.final_norm))
        if self.config.final_norm:
            return self.paint(tokens.patches)
        return self.paint(tokens.blocks[-1].patches + 0.0 * tokens.patches)  # DDP waits for the norm's gradient, and has 0

    @torch.no_grad()
    def reconstruct(self, nets: Nets, images: Tensor, draw: Draw) -> Reconstruction:
        """images [B, C, H, W] as the encoder takes them -> pictures of what it sees and what it makes of it."""
        mask = self._masks(draw)
        shape = {"patch": self.spec.patch, "grid": self.spec.grid, "channels_first": True}
        pred = unpatchify(self.predict(nets, images, mask).to(images.dtype), **shape)
        hidden = mask[..., None].expand(-1, -1, self.paint.out_features)
        hidden = unpatchify(hidden, **shape)
        return Reconstruction(images, images.masked_fill(hidden, 0.0), pred, torch.where(hidden, pred, images))

    def _masks(self, draw: Draw) -> Tensor:
        """[B, N] bool."""
        unit = self.config.mask_unit
        patches = unit // self.spec.patch[0], unit // self.spec.patch[1]
        return unit_masks(draw("mask", self.num_units), self.units, patches, self.num_masked)


def _that_fit(spec: EncoderSpec) -> str:
    """Which sides of a unit are possible, in words."""
    step, most = math.lcm(*spec.patch), math.gcd(*spec.image_size)
    fits = [unit for unit in range(step, most + 1, step) if most % unit == 0 and (unit, unit) != spec.image_size]
    return f"possible are {', '.join(map(str, fits))}" if fits else "none does"
