"""Masked autoencoding: drop most patches, encode the rest, and paint the dropped ones (He et al. 2022).

The surprising decision: the encoder never sees a mask token, only the kept quarter of the patches, in the order of their noise.
"""

from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vitssl.config import Count, Section
from vitssl.errors import ConfigError
from vitssl.losses.pixels import masked_mse, normalize_patches, patchify, unpatchify
from vitssl.masks.random import in_blocks, num_kept, random_keep
from vitssl.models.cross import CrossDecoder
from vitssl.models.encoder import Tokens
from vitssl.models.predictor import Decoder
from vitssl.models.spec import EncoderSpec
from vitssl.objectives.base import Nets, Objective
from vitssl.objectives.single import SingleConfig
from vitssl.plan import Stack
from vitssl.schedule import Clock
from vitssl.sections import Share
from vitssl.task import Draw, Embeddings
from vitssl.views import View


class DecoderConfig(Section):
    """He et al. 2022, table 1 (a, b)."""

    dim: Count = Field(512, description="width")
    depth: Count = Field(8, description="blocks")
    heads: Count = Field(16, description="attention heads")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of the MLPs over the width")
    attention: Literal["self", "cross"] = Field(
        "self", description="of mask tokens: to all tokens, or to the encoder's alone (CrossMAE)"
    )
    mixing: bool = Field(
        False, description="of attention=cross: each block looks at a mixture of the encoder's blocks, before its final norm"
    )
    positions: Literal["sincos", "learned"] = Field("sincos", description="fixed, as the encoder's; or learned (Pixio)")

    @model_validator(mode="after")
    def _mixes_for_somebody(self) -> "DecoderConfig":
        if self.mixing and self.attention == "self":
            raise ValueError("mixing is of what attention=cross looks at, and attention=self; set that, or leave mixing out")
        return self

    @property
    def sizes(self) -> dict[str, Any]:
        return self.model_dump(exclude={"attention", "mixing", "positions"})

    def build(self, spec: EncoderSpec, out: int) -> Decoder:
        if self.attention == "cross":
            return CrossDecoder(spec, **self.sizes, positions=self.positions, mixing=self.mixing, out=out)
        return Decoder(spec, **self.sizes, positions=self.positions, out=out)


CROP = SingleConfig(scale=(0.2, 1.0))
"""He et al. 2022, appendix A.1."""


class Reconstruction(NamedTuple):
    """Pictures [B, C, H, W] in the units of the images given."""

    original: Tensor
    masked: Tensor  # removed patches at 0, the mean colour
    prediction: Tensor  # every patch as predicted; with norm_pix painted with the target's own mean and deviation
    pasted: Tensor  # the prediction where patches were removed, the original elsewhere


class MAE(Objective):
    """Mean squared error on the removed patches, per patch normalised unless ``norm_pix`` is off.

    It compares no samples: ``embed`` gives the error of each and ``compare`` their mean, so that a method which does compare
    some can be this one and more.
    """

    class Config(Objective.Config):
        mask_ratio: float = Field(0.75, gt=0, lt=1, description="fraction of patches removed; int(N * (1 - ratio)) are kept")
        block: Count = Field(1, description="patches are removed in squares of block x block (Pixio: 4)")
        decode: Share = Field(1.0, description="fraction of the removed patches that are painted, drawn anew (CrossMAE: 0.333)")
        norm_pix: bool = Field(True, description="predict each patch normalised by its own mean and deviation")
        decoder: DecoderConfig = DecoderConfig()
        view: SingleConfig = CROP

    hides = True

    def __init__(self, config: Config, spec: EncoderSpec) -> None:
        super().__init__(config, spec)
        spec.refuse_drops(f"objectives.{self.name}")
        block = config.block
        if spec.grid[0] % block or spec.grid[1] % block:
            raise ConfigError(
                f"objectives.{self.name}.block={block} does not divide the {spec.grid[0]}x{spec.grid[1]} patches of an image"
            )
        self.num_blocks = spec.num_patches // block**2
        unit = "patches" if block == 1 else "blocks"
        kept = num_kept(self.num_blocks, config.mask_ratio, key=f"objectives.{self.name}.mask_ratio", unit=unit)
        painted = max(1, round(config.decode * (self.num_blocks - kept)))
        self.num_keep, self.num_painted = kept * block**2, painted * block**2
        out = spec.patch[0] * spec.patch[1] * spec.channels
        self.decoder = config.decoder.build(spec, out)

    def views(self) -> dict[str, View]:
        return self.config.view.views(self.spec.image_size)

    def embed(self, nets: Nets, views: dict[str, Tensor], draw: Draw) -> Embeddings:
        """``error`` [B]: of each image of views["image"] [B, C, H, W]."""
        pred, painted = self._predict(nets, views["image"], draw, decode=self._decode)
        return {"error": masked_mse(pred, self._target(views["image"])[0], painted, each=True)}

    def compare(self, embeddings: Embeddings, targets: Embeddings, clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean error, and itself as the only metric ``loss``."""
        loss = embeddings["error"].mean()
        return loss, {"loss": loss.detach()}

    def stacks(self) -> list[Stack]:
        decoder, spec = self.config.decoder, self.spec
        return [
            Stack(spec.prefix + self.num_keep, spec.dim, spec.depth, spec.heads),
            Stack(spec.prefix + self.num_keep + self.num_painted, decoder.dim, decoder.depth, decoder.heads, decoder.mlp_ratio),
        ]

    @torch.no_grad()
    def reconstruct(self, nets: Nets, images: Tensor, draw: Draw) -> Reconstruction:
        """images [B, C, H, W] as the encoder takes them -> pictures of what it sees and what the decoder makes of it."""
        pred, mask = self._predict(nets, images, draw)
        _, mean, std = self._target(images)
        pixels = patchify(images, self.spec.patch)  # [B, N, P]
        pred = pred.to(pixels.dtype) * std + mean
        removed = mask[..., None]
        patches = (pixels, pixels.masked_fill(removed, 0.0), pred, torch.where(removed, pred, pixels))
        return Reconstruction(*(unpatchify(p, self.spec.patch, self.spec.grid) for p in patches))

    @property
    def _decode(self) -> float | None:
        """Of the removed patches; None: all patches, for mask tokens that attend to each other see each other anyway."""
        return None if self.config.decode == 1 and self.config.decoder.attention == "self" else self.config.decode

    def _predict(self, nets: Nets, images: Tensor, draw: Draw, *, decode: float | None = None) -> tuple[Tensor, Tensor]:
        """(prediction [B, N, P], [B, N] bool: True where removed and, with ``decode``, painted)."""
        keep, places, painted = self._masks(draw("mask", self.num_blocks), decode=decode)
        return self._paint(nets.student(images, keep=keep, last_blocks=self.decoder.looks), keep, places), painted

    def _paint(self, tokens: Tokens, keep: Tensor, places: Tensor | None) -> Tensor:
        """[B, N, P]: what the decoder makes of the tokens of ``keep``."""
        return self.decoder(tokens, keep, places)

    def _masks(self, noise: Tensor, *, decode: float | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """noise [B, blocks] -> (keep [B, K]; which others are painted [B, M], None: all; the same as a mask [B, N])."""
        num = self.num_keep if decode is None else self.num_keep + self.num_painted
        blocks, _ = random_keep(noise, num // self.config.block**2)
        keep, places = in_blocks(blocks, self.spec.grid, self.config.block).split([self.num_keep, num - self.num_keep], dim=1)
        others = torch.ones(len(keep), self.spec.num_patches, dtype=torch.bool, device=keep.device)
        if decode is None:
            return keep, None, others.scatter_(1, keep, False)
        return keep, places, ~others.scatter_(1, places, False)

    def _target(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(target [B, N, P], and the mean and deviation that make pixels of it)."""
        pixels = patchify(images, self.spec.patch)
        if self.config.norm_pix:
            return normalize_patches(pixels)
        return pixels, torch.zeros_like(pixels[..., :1]), torch.ones_like(pixels[..., :1])
