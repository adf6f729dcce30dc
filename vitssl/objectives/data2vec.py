"""Predicting what a teacher makes of the whole image from an image with holes (data2vec, Baevski et al. 2022, for images).

The surprising decision: the target of a masked patch is no token and no pixel but the average of the teacher's last blocks at
its place, each normalised over its channels, so it holds the whole image's context. What differs from the official code on
purpose: masks that its generator leaves short of their number (a third of them, by one to nine patches) are filled up, so that
the mean over masked patches is the same in one batch and in parts of it; the teacher computes in the run's precision, not in
fp32; and colours are changed after the crop, so contrast is about the crop's mean and not the whole image's.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vitssl.config import Count
from vitssl.errors import ConfigError
from vitssl.losses.regression import smooth_l1
from vitssl.masks.blocks import block_masks, block_noise
from vitssl.models.init import narrow_normal
from vitssl.models.spec import EncoderSpec
from vitssl.objectives.base import Nets, Objective
from vitssl.objectives.single import SingleConfig
from vitssl.schedule import Clock, Schedule
from vitssl.sections import Area, PhotometricConfig, Positive
from vitssl.task import Draw
from vitssl.views import View


class ViewConfig(SingleConfig):
    scale: Area = Field((0.08, 1.0), description="area of the crop, as a fraction of the image")
    photometric: PhotometricConfig = PhotometricConfig(jitter=1.0, saturation=0.4, hue=0.0)


class Data2Vec(Objective):
    """Smooth L1 between predictions at masked patches and the average of the teacher's last blocks."""

    class Config(Objective.Config):
        mask_ratio: float = Field(0.612, gt=0, lt=1, description="fraction of patches masked, rounded (0.612: 120 of 196)")
        min_block: Count = Field(16, description="patches of the smallest block of a mask, where so many are left to mask")
        blocks: Count = Field(6, description="last blocks of the teacher that are averaged")
        norm_average: bool = Field(True, description="normalise the average once more (post_target_layer_norm)")
        beta: Positive = Field(2.0, description="error from which the loss is linear")
        view: ViewConfig = ViewConfig()

    hides = True
    momentum = Schedule(0.999, final=0.9998, shape="linear")

    def __init__(self, config: Config, spec: EncoderSpec) -> None:
        super().__init__(config, spec)
        if config.blocks > spec.depth:
            raise ConfigError(
                f"objectives.data2vec.blocks={config.blocks}: the encoder has {spec.depth}; the paper takes half of ViT-B's 12"
            )
        self.num_masked = round(spec.num_patches * config.mask_ratio)
        if not 0 < self.num_masked < spec.num_patches:
            raise ConfigError(
                f"objectives.data2vec.mask_ratio={config.mask_ratio} masks {self.num_masked} of {spec.num_patches} patches;"
                " some must be masked and some be left"
            )
        self.mask_token = nn.Parameter(torch.empty(1, 1, spec.dim))  # 3-D as in the official code, where it is weight-decayed
        self.predict = nn.Linear(spec.dim, spec.dim)
        for weight in (self.mask_token, self.predict.weight):
            narrow_normal(weight)
        nn.init.zeros_(self.predict.bias)

    def views(self) -> dict[str, View]:
        return self.config.view.views(self.spec.image_size)

    def forward(self, nets: Nets, views: dict[str, Tensor], clock: Clock, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """views["image"] [B, C, H, W] -> the loss, and itself as the only metric ``loss``."""
        images, grid = views["image"], self.spec.grid
        noise = draw("mask", block_noise(grid), host=True)  # a GPU would be kept busy by a thousand tiny kernels
        mask = block_masks(noise, grid, self.num_masked, min_area=self.config.min_block, exact=True)
        loss = smooth_l1(*self.compared(nets, images, mask.to(images.device)), beta=self.config.beta)
        return loss, {"loss": loss.detach()}

    def compared(self, nets: Nets, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(predictions, targets), each [B, M, D], of the masked patches in raster order; every row of mask has M of them."""
        places = torch.argsort((~mask).to(torch.int8), dim=1, stable=True)[:, : self.num_masked]  # no count to wait for
        places = places[..., None].expand(-1, -1, self.spec.dim)
        tokens = nets.student(images, mask=mask, mask_token=self.mask_token).patches
        return self.predict(tokens.gather(1, places)), self.features(nets, images).gather(1, places)

    def features(self, nets: Nets, images: Tensor) -> Tensor:
        """[B, N, D]: the average of the teacher's last blocks, before its final norm."""
        blocks = nets.teacher(images, last_blocks=self.config.blocks).blocks
        width = (self.spec.dim,)
        average = sum(F.layer_norm(block.patches, width) for block in blocks) / len(blocks)
        return F.layer_norm(average, width) if self.config.norm_average else average
