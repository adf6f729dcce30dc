"""CMAE: MAE, and what a second decoder makes of the masked view is to be told from other images (Huang et al. 2023).

The surprising decision: both views are of one crop, the target's shifted by a few pixels, since a masked view has too little in
common with another crop of its image; and not the encoder's tokens are contrasted, but those a decoder completed.
"""

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from vitssl.config import Count
from vitssl.losses.contrast import info_nce
from vitssl.losses.pixels import masked_mse
from vitssl.models.mlp import mlp
from vitssl.models.positions import check_size
from vitssl.models.predictor import Decoder
from vitssl.models.spec import EncoderSpec
from vitssl.models.twin import Twin
from vitssl.objectives.base import Nets
from vitssl.objectives.mae import MAE, Reconstruction
from vitssl.objectives.pairs import HALF
from vitssl.plan import Stack
from vitssl.schedule import Clock, Schedule
from vitssl.sections import PhotometricConfig, Positive, Strength
from vitssl.task import Draw, Embeddings
from vitssl.views import Photometric, View


class CMAE(MAE):
    """``reconstruction`` x MAE's loss + ``contrast`` x InfoNCE of the completed view with a teacher's of the shifted one.

    Both views are larger than the encoder's images by ``shift``: the masked one is its upper left corner, the target a cut from
    anywhere, in other colours. Numbers are those of the official code, where the teacher's tokens are not normalised.
    """

    class Config(MAE.Config):
        mask_ratio: float = Field(0.65, gt=0, lt=1, description="fraction of patches removed (paper: 0.75)")
        block: Count = Field(2, description="patches are removed in squares of block x block")
        shift: Count = Field(32, description="the target is shifted by fewer pixels; patches divide image size + shift")
        target: PhotometricConfig = HALF
        feature_depth: Count = Field(2, description="blocks of the decoder of features, otherwise the size of that of pixels")
        temperature: Positive = Field(0.07, description="of the logits")
        reconstruction: Strength = Field(1.0, description="weight of the error on removed patches")
        contrast: Strength = Field(1.0, description="weight of InfoNCE, which is times twice the temperature")
        hidden: Count = Field(1536, description="width of the hidden layers of projector and predictor")
        out: Count = Field(256, description="width of queries and keys")

    momentum = Schedule(0.996, final=0.996, shape="constant")
    couples_samples = True

    def __init__(self, config: Config, spec: EncoderSpec) -> None:
        super().__init__(config, spec)
        self.size = tuple(side + config.shift for side in spec.image_size)
        check_size(self.size, spec.patch, f"objectives.cmae.shift={config.shift}: a crop of")
        self.feature_decoder = Decoder(spec, **config.decoder.sizes | {"depth": config.feature_depth}, out=spec.dim)
        self.projector = mlp([spec.dim, config.hidden, config.out], bias=False, eps=1e-6)
        self.predictor = mlp([config.out, config.hidden, config.out], bias=False, eps=1e-6)
        self.keys = Twin(self.projector, trains=True)

    def views(self) -> dict[str, View]:
        """One crop in two colours: views that differ in those alone show the same."""
        (view,) = self.config.view.views(self.size).values()
        return {"image": view, "target": replace(view, photometric=Photometric(**self.config.target.model_dump()))}

    def embed(self, nets: Nets, views: dict[str, Tensor], draw: Draw) -> Embeddings:
        """``error`` [B] of each image, ``feature`` [B, D]: the mean of all patches that the second decoder completed."""
        images = self._corner(views["image"])
        keep, places, painted = self._masks(draw("mask", self.num_blocks), decode=self._decode)
        tokens = nets.student(images, keep=keep, last_blocks=self.decoder.looks)
        pred = self._paint(tokens, keep, places)
        error = masked_mse(pred, self._target(images)[0], painted, each=True)
        return {"error": error, "feature": self.feature_decoder(tokens, keep).mean(dim=1)}

    def targets(self, nets: Nets, views: dict[str, Tensor], draw: Draw) -> Embeddings:
        """``target`` [B, D]: the mean of the teacher's patches before its final norm, of all of the shifted view."""
        shifts = (draw("shift", 2) * self.config.shift).long()
        shown = shifted(views["target"], shifts, self.spec.image_size)
        (last,) = nets.teacher(shown, last_blocks=1).blocks
        return {"target": last.pool("mean")}

    def compare(self, embeddings: Embeddings, targets: Embeddings, clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        queries = self.predictor(self.projector(embeddings["feature"]))
        with torch.no_grad():
            keys = self.all_rows(self.keys(targets["target"]))
        reconstruction, _ = super().compare(embeddings, targets, clock)
        contrast = info_nce(queries, keys, self.own_rows(queries), temperature=self.config.temperature)
        parts = {"reconstruction": reconstruction, "contrast": contrast}
        loss = sum(getattr(self.config, name) * part for name, part in parts.items())
        return loss, {name: part.detach() for name, part in {"loss": loss, **parts}.items()}

    def reconstruct(self, nets: Nets, images: Tensor, draw: Draw) -> Reconstruction:
        """As MAE, of the corner that is masked."""
        return super().reconstruct(nets, self._corner(images), draw)

    def stacks(self) -> list[Stack]:
        encoder, decoder = super().stacks()
        everything = self.spec.prefix + self.spec.num_patches
        return [encoder, decoder, replace(decoder, tokens=everything, depth=self.config.feature_depth)]

    def _corner(self, images: Tensor) -> Tensor:
        height, width = self.spec.image_size
        return images[..., :height, :width]


def shifted(images: Tensor, shifts: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, H, W] -> [B, C, *size]: of each image what begins shifts [B, 2] pixels (down, right) from its corner."""
    down, right = (begin[:, None] + torch.arange(side, device=begin.device) for begin, side in zip(shifts.T, size, strict=True))
    rows = torch.arange(len(images), device=images.device)[:, None, None]
    return images[rows, :, down[:, :, None], right[:, None, :]].movedim(-1, 1)  # from [B, height, width, C]
