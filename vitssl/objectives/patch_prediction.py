"""Naming the mean colour of corrupted patches: the ViT paper's own self-supervision (Dosovitskiy et al. 2021, appendix B.1.2).

Half of the patch embeddings are corrupted as words are in BERT: of these 80 % become a learned token, 10 % another patch's
embedding, 10 % stay; at each of them one of 512 colours is to be named. A patch's embedding depends on its pixels alone, so
another's is had by putting another patch's pixels there. The paper does not say whose patch; here it is one of the same image,
so that samples have nothing to do with each other.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vitssl.errors import ConfigError
from vitssl.losses.colours import mean_colours
from vitssl.losses.pixels import patchify, unpatchify
from vitssl.losses.precision import full_precision
from vitssl.masks.corrupt import corrupt
from vitssl.models.spec import EncoderSpec
from vitssl.objectives.base import Nets, Objective
from vitssl.objectives.single import SingleConfig
from vitssl.schedule import Clock
from vitssl.sections import Area
from vitssl.task import Draw
from vitssl.views import View

_MOST = 1 << 16  # classes; beyond that no patch has a colour of its own to learn from


class ViewConfig(SingleConfig):
    scale: Area = Field((0.05, 1.0), description="area of the crop, as a fraction of the image")


class PatchPrediction(Objective):
    """Cross entropy of the mean colours of corrupted patches, each from its own token."""

    class Config(Objective.Config):
        corrupted: float = Field(0.5, gt=0, le=1, description="fraction of patches corrupted, rounded")
        bits: int = Field(3, ge=1, le=8, description="per channel of a colour (3: 512 colours)")
        view: ViewConfig = ViewConfig()

    hides = True

    def __init__(self, config: Config, spec: EncoderSpec) -> None:
        super().__init__(config, spec)
        classes = 2 ** (config.bits * spec.channels)
        if classes > _MOST:
            raise ConfigError(
                f"objectives.patch_prediction.bits={config.bits} of {spec.channels} channels are {classes:,} colours, and at"
                f" most {_MOST:,} are told apart; take fewer bits or encoder.channels=3"
            )
        self.num_corrupted = round(spec.num_patches * config.corrupted)
        if self.num_corrupted < 1 or spec.num_patches < 2:
            raise ConfigError(
                f"objectives.patch_prediction.corrupted={config.corrupted} of {spec.num_patches} patches: one must be, and"
                " another there to stand for it; take smaller patches or a larger fraction"
            )
        self.mask_token = nn.Parameter(torch.empty(1, 1, spec.dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.colour = nn.Linear(spec.dim, classes)

    def views(self) -> dict[str, View]:
        return self.config.view.views(self.spec.image_size)

    def forward(self, nets: Nets, views: dict[str, Tensor], clock: Clock, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """views["image"] [B, C, H, W] -> the loss, and as metrics itself and the ``accuracy`` of the colours."""
        images, patch = views["image"], self.spec.patch
        places, masked, source = corrupt(draw("mask", 3 * self.spec.num_patches), self.num_corrupted)
        tokens = nets.student(self.swapped(images, source), mask=masked, mask_token=self.mask_token).patches
        tokens = tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))
        logits = self.colour(tokens)  # [B, corrupted, classes]
        colours = mean_colours(nets.restore(images), patch, bits=self.config.bits).gather(1, places)
        loss = _cross_entropy(logits.flatten(0, 1), colours.flatten())
        accuracy = (logits.detach().argmax(dim=-1) == colours).float().mean()
        return loss, {"loss": loss.detach(), "accuracy": accuracy}

    def swapped(self, images: Tensor, source: Tensor) -> Tensor:
        """Images [B, C, H, W] whose patch n is that of source [B, N] at n."""
        patches = patchify(images, self.spec.patch)
        patches = patches.gather(1, source[..., None].expand(-1, -1, patches.shape[-1]))
        return unpatchify(patches, self.spec.patch, self.spec.grid)


_cross_entropy = full_precision(F.cross_entropy)
