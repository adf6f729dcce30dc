"""CAN: contrast, masked autoencoding and noise prediction in one masked forward of two views (Mishra et al. 2022).

Half of each view is removed and the rest is shown with Gaussian noise. The encoder's tokens are pooled for NT-Xent with those
of the other view, and painted by MAE's decoder: the removed patches as they were, the shown ones as the noise that was on
them. So a step costs two of MAE's on as many tokens, whatever is learnt beside it.

The paper's code (JAX) is not public. Projector, noise on normalised images, and what the decoder is told of it and where are
those of its authors' second code (PyTorch, github.com/shlokk/mae-contrastive). On purpose otherwise: that code tells the
decoder waves of the deviation itself, at most 0.05, which hardly move; here they are of its share of ``sigma``, in 1000 steps
as in diffusion (Ho et al. 2020). What is painted is the clean view, not the noisy one. The class token is not pooled with the
patches. And negatives are those of the whole batch, not of a GPU.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from vitssl.config import Count
from vitssl.draws import normal
from vitssl.errors import ConfigError
from vitssl.losses.contrast import nt_xent
from vitssl.losses.pixels import masked_mse, unpatchify
from vitssl.models.encoder import Tokens
from vitssl.models.init import init_as_mae
from vitssl.models.mlp import mlp
from vitssl.models.positions import waves
from vitssl.models.spec import EncoderSpec
from vitssl.objectives.base import Nets
from vitssl.objectives.mae import CROP, MAE
from vitssl.objectives.pairs import HALF
from vitssl.objectives.single import SingleConfig
from vitssl.plan import Stack
from vitssl.schedule import Clock
from vitssl.sections import Positive, Strength
from vitssl.task import Draw, Embeddings
from vitssl.views import View

LEVELS, STEPS = 128, 1000  # width of the waves that tell the noise level; how far apart levels stand


class CAN(MAE):
    """``contrast`` x NT-Xent + ``reconstruction`` x MAE's loss + ``denoising`` x the error of the predicted noise."""

    class Config(MAE.Config):
        mask_ratio: float = Field(0.5, gt=0, lt=1, description="fraction of each view's patches removed")
        view: SingleConfig = CROP.model_copy(update={"photometric": HALF})
        contrast: Strength = Field(0.03, description="weight of NT-Xent between the views")
        reconstruction: Strength = Field(0.67, description="weight of the error on removed patches")
        denoising: Strength = Field(0.3, description="weight of the error of the noise on shown patches; 0: no noise is added")
        sigma: Positive = Field(0.05, description="largest deviation of the noise, in units of the normalised image")
        temperature: Positive = Field(0.1, description="of the logits")
        hidden: Count | None = Field(None, description="width of the projector's hidden layers; null: the encoder's")
        out: Count = Field(128, description="width of the projection")
        layers: Count = Field(2, description="of the projector")
        norm: bool = Field(False, description="BatchNorm after the projector's hidden layers")

    couples_samples = True

    def __init__(self, config: Config, spec: EncoderSpec) -> None:
        super().__init__(config, spec)
        if config.decoder.attention == "cross":
            raise ConfigError(
                "objectives.can.decoder.attention=cross paints removed patches alone, and CAN asks for the noise of shown ones;"
                " take self"
            )
        self.projector = mlp([spec.dim, *[config.hidden or spec.dim] * (config.layers - 1), config.out], norm=config.norm)
        self.level = mlp([LEVELS, spec.dim, spec.dim], norm=False) if config.denoising else None
        init_as_mae(self.projector)
        if self.level is not None:
            init_as_mae(self.level)

    def views(self) -> dict[str, View]:
        view = super().views()["image"]
        return {"image": view, "other": replace(view, copy=1)}

    def embed(self, nets: Nets, views: dict[str, Tensor], draw: Draw) -> Embeddings:
        """Pooled shown patches [B, D] of each view, and the errors [B] of each sample, over both of its views."""
        images = torch.cat([views["image"], views["other"]])  # [2B, C, H, W]

        def both(name: str, num: int) -> Tensor:
            return torch.cat([draw(name, num), draw(f"{name}.other", num)])

        keep, places, painted = self._masks(both("mask", self.num_blocks), decode=self._decode)
        level = both("level", 1)[:, 0] if self.level else None
        noise = None if level is None else self._noise(both, keep, level * self.config.sigma).to(images.dtype)
        shown = images if noise is None else images + unpatchify(noise, self.spec.patch, self.spec.grid)
        tokens = nets.student(shown, keep=keep)
        pred = self._paint(tokens, keep, places, level=level)
        errors = {"reconstruction": masked_mse(pred, self._target(images)[0], painted, each=True)}
        if noise is not None:
            seen = torch.zeros_like(painted).scatter_(1, keep, True)
            errors["denoising"] = masked_mse(pred, noise, seen, each=True)
        first, second = tokens.pool("mean").chunk(2)
        return {"first": first, "second": second} | {name: sum(each.chunk(2)) / 2 for name, each in errors.items()}

    def compare(self, embeddings: Embeddings, targets: Embeddings, clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        first, second = (self.projector(embeddings[name]) for name in ("first", "second"))
        everybody = self.all_rows(first), self.all_rows(second)
        parts = {"contrast": nt_xent(first, second, *everybody, self.own_rows(first), temperature=self.config.temperature)}
        parts |= {name: embeddings[name].mean() for name in ("reconstruction", "denoising") if name in embeddings}
        loss = sum(getattr(self.config, name) * part for name, part in parts.items())
        return loss, {"loss": loss.detach()} | {name: part.detach() for name, part in parts.items()}

    def stacks(self) -> list[Stack]:
        return super().stacks() * 2

    def _noise(self, numbers: Callable[[str, int], Tensor], keep: Tensor, sigma: Tensor) -> Tensor:
        """[2B, N, P]: Gaussian of deviation ``sigma`` [2B] on the patches of ``keep`` [2B, K], 0 elsewhere."""
        width = self.spec.patch[0] * self.spec.patch[1] * self.spec.channels
        num = keep.shape[1] * width
        noise = normal(numbers("noise", num + num % 2))[:, :num].reshape(len(keep), -1, width) * sigma[:, None, None]
        return noise.new_zeros(len(keep), self.spec.num_patches, width).scatter_(1, keep[..., None].expand_as(noise), noise)

    def _paint(self, tokens: Tokens, keep: Tensor, places: Tensor | None, *, level: Tensor | None = None) -> Tensor:
        """As MAE, with the noise level [B] in [0, 1) (None: no noise was added) on every token that the decoder is given."""
        if self.level:
            level = torch.zeros(len(keep), device=keep.device) if level is None else level
            told = self.level(waves(STEPS * level, LEVELS).to(tokens.patches.dtype))[:, None]  # [B, 1, D]
            tokens = replace(tokens, prefix=tokens.prefix + told, patches=tokens.patches + told)
        return super()._paint(tokens, keep, places)
