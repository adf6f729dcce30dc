"""The one door to a ViT: ``encoder(images, keep=...)`` drops tokens, ``mask=..., mask_token=...`` replaces them.

The mask token belongs to the objective, so the encoder's state is a plain timm state: what pretraining writes,
``timm.create_model(encoder.architecture, **encoder.arguments)`` loads strictly.

Legend of shapes: B images, C channels, N patches, K kept patches, R prefix tokens (class, then registers), D width.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from vitssl.errors import ConfigError
from vitssl.models.adapters.build import build
from vitssl.models.adapters.timm_vit import TimmViT, compile_in_place, drop_evenly
from vitssl.models.init import (
    init_as_beit,
    init_as_dino,
    init_as_dinov2,
    init_as_jepa,
    init_as_mae,
    init_as_moco_v3,
    init_as_msn,
)
from vitssl.models.positions import FIRST, Grid, ResampleRule, check_size, sincos_2d
from vitssl.models.spec import EncoderSpec, Pooling
from vitssl.models.state import require_fit
from vitssl.models.stems import TokensToToken

_INITS = {
    "mae": init_as_mae,
    "moco_v3": init_as_moco_v3,
    "dino": init_as_dino,
    "dinov2": init_as_dinov2,
    "msn": init_as_msn,
    "beit": init_as_beit,
    "jepa": init_as_jepa,
}


@dataclass(frozen=True)
class Tokens:
    """What an encoder gives: tokens after the final norm, and the outputs of the last blocks before it."""

    prefix: Tensor  # [B, R, D]
    patches: Tensor  # [B, N or K, D]
    blocks: list["Tokens"] = field(default_factory=list)
    class_token: bool = True

    @property
    def cls(self) -> Tensor | None:
        """[B, D], or None where the model has no class token (registers alone are not one)."""
        return self.prefix[:, 0] if self.class_token else None

    def pool(self, pooling: Pooling) -> Tensor:
        """[B, D]: the mean over patches, or the class token, which there must be (:meth:`EncoderSpec.refuse_pooling`)."""
        if pooling == "mean":
            return self.patches.mean(dim=1)
        assert self.cls is not None, "a pooling that was to be refused by the spec"
        return self.cls


TokensOrTensor = TypeVar("TokensOrTensor", Tokens, Tensor)


class Encoder(nn.Module):
    """A ViT behind an adapter. Its parameters are called ``vit.<name in timm>``; :meth:`state` gives the plain names.

    ``checkpointing`` is a switch: blocks then keep only their inputs and are computed again in the backward pass. ``packing``
    is one: whether images of several sizes share a pass where they can (:meth:`together`).
    """

    def __init__(
        self, vit: TimmViT, spec: EncoderSpec, *, architecture: str, arguments: dict[str, Any], positions: str
    ) -> None:
        super().__init__()
        self.vit = vit
        self.spec = spec
        self.architecture = architecture
        self.arguments = arguments
        self.positions = positions
        self.checkpointing = False
        self.packing = True

    @classmethod
    def create(
        cls,
        name: str,
        *,
        image_size: int | Grid,
        patch_size: int | Grid | None = None,
        channels: int = 3,
        registers: int | None = 0,
        class_token: bool | None = True,
        stem: Literal["t2t"] | None = None,
        positions: Literal["learned", "sincos", "sincos_moco_v3"] = "learned",
        pos_resample: ResampleRule = "timm",
        drop_path: float = 0.0,
        drop_path_shape: Literal["linear", "uniform"] = "linear",
        weights_init: Literal["timm", "mae", "moco_v3", "dino", "dinov2", "msn", "beit", "jepa"] = "timm",
        freeze_patch_embed: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> "Encoder":
        """A new encoder over the timm ``VisionTransformer``, ``Eva`` or ``Beit`` called ``name``, without a head.

        ``None`` for patch size, registers or class token means what the name says. ``positions="sincos"`` freezes MAE's
        table (zero for prefix tokens), ``"sincos_moco_v3"`` MoCo v3's. ``arguments`` are further keyword arguments of
        ``timm.create_model``. ``stem="t2t"`` is Tokens-to-Token in the place of the patch embedding, which timm does not have.
        Raises ConfigError for an unknown or unsupported name, a size that the patches do not divide, or an argument that
        has a key of its own.
        """
        size = _pair(image_size)
        own = {"image_size": size, "patch_size": patch_size, "channels": channels}
        own |= {"registers": registers, "class_token": class_token}
        vit, told = build(name, own, arguments or {}, pos_resample=pos_resample, drop_path=drop_path, stem=stem)
        check_size(size, vit.patch, "encoder.image_size")
        spec = EncoderSpec(
            dim=vit.dim,
            depth=len(vit.blocks),
            heads=next(part.num_heads for part in vit.blocks[0].modules() if hasattr(part, "num_heads")),
            patch=vit.patch,
            grid=vit.grid,
            prefix=vit.prefix,
            channels=channels,
            class_token=vit.cls_token is not None,
            drops=vit.drops,
            any_size=vit.any_size,
            overlaps=vit.overlaps,
        )
        encoder = cls(vit, spec, architecture=name, arguments=told, positions=positions)
        if weights_init in _INITS:
            _INITS[weights_init](encoder)
        if encoder.fixed:
            encoder._fix_positions()
        if drop_path_shape == "uniform":
            drop_evenly(vit.blocks, drop_path)
        vit.patch_embed.requires_grad_(not freeze_patch_embed)
        return encoder

    def forward(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        last_blocks: int = 0,
    ) -> Tokens:
        """images [B, C, H, W], normalised -> :class:`Tokens`.

        ``keep`` [B, K] int64: only these patches go through the blocks, in this order, each with its own position; prefix
        tokens always stay. ``mask`` [B, N] bool: where True the patch embedding is replaced by ``mask_token`` [D] before
        positions are added. ``last_blocks``: how many block outputs to return as well; one more than there are blocks: what
        goes into the first too. Any image size that the patches divide is served, by resampled positions. Raises ValueError
        for a mixture of the two doors, ConfigError for a size.
        """
        if not 0 <= last_blocks <= self.spec.depth + 1:
            raise ValueError(f"last_blocks={last_blocks}, but the encoder has {self.spec.depth} blocks")
        doors = {"keep": keep, "mask": mask, "mask_token": mask_token}
        self._check_doors(images, **doors)
        x, blocks = self.vit(images, **doors, last_blocks=last_blocks, checkpointing=self.checkpointing)
        return replace(self._split(x), blocks=[self._split(block) for block in blocks])

    def together(
        self,
        batches: Sequence[Tensor],
        *,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> list[Tokens]:
        """Tokens of each of ``batches``, images of several sizes; ``keep`` and ``mask`` are of the first.

        The numbers are those of a pass for each; where the blocks are timm's plain ones and :attr:`packing` says so, they
        share one (:mod:`adapters.packing`).
        """
        (first, *others), doors = batches, {"keep": keep, "mask": mask, "mask_token": mask_token}
        if not (others and self.packing and self.vit.packs):
            return [self(first, **doors), *map(self, others)]
        self._check_doors(first, **doors)
        for images in others:
            self._check_doors(images)
        found, _ = self.vit(first, **doors, others=others, checkpointing=self.checkpointing)
        return [self._split(x) for x in found]

    def attention(self, images: Tensor, blocks: Collection[int]) -> list[Tensor]:
        """[B, heads, T, T] each, over prefix and patch tokens: what the blocks of these numbers (from 0) attend to."""
        return self.vit.attention(images, blocks)

    def norm(self, tokens: TokensOrTensor) -> TokensOrTensor:
        """The final norm, on a block's Tokens or on a tensor [..., D]."""
        if isinstance(tokens, Tensor):
            return self.vit.norm(tokens)
        return replace(tokens, prefix=self.vit.norm(tokens.prefix), patches=self.vit.norm(tokens.patches))

    def drop_norm(self) -> nn.Module:
        """Replace the final norm by the identity, for a head that normalises after pooling; returns the norm removed."""
        norm, self.vit.norm = self.vit.norm, nn.Identity()
        self.arguments = self.arguments | self.vit.norm_arguments(after_pooling=False)
        return norm

    def arguments_with(self, head: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by which ``timm.create_model`` makes this encoder with a head: ``head`` is what the head says of itself."""
        own = {key: value for key, value in head.items() if key not in ("fc_norm", "final_norm")}
        return self.arguments | own | self.vit.norm_arguments(after_pooling=head["fc_norm"])

    @property
    def stem(self) -> str | None:
        """What timm does not have in the place of its patch embedding; it belongs beside the weights."""
        return "t2t" if isinstance(self.vit.patch_embed, TokensToToken) else None

    @property
    def fixed(self) -> bool:
        """Whether positions are a table, and which does not train."""
        return self.positions in FIRST

    def table(self, grid: Grid) -> Tensor:
        """[N, D] float64: the fixed positions of a grid."""
        return sincos_2d(self.spec.dim, grid, first=FIRST[self.positions])

    @property
    def pos_resample(self) -> ResampleRule:
        """The rule that carries positions to other image sizes; it belongs in ``encoder.json``."""
        return self.vit.pos_resample

    def compile_blocks(self) -> None:
        """Compile every block in place; state names do not change."""
        compile_in_place(self.vit.blocks)

    def state(self) -> dict[str, Tensor]:
        """The weights under timm's names, for ``timm.create_model(architecture, **arguments)``, strictly."""
        return dict(self.vit.state_dict())

    def load_state(self, state: Mapping[str, Tensor], *, resample: bool = False, grid: Grid | None = None) -> None:
        """Take over weights under timm's names. Raises CheckpointError that names what is missing, left over or of other shape.

        With ``resample`` positions of another grid are carried over by this encoder's rule; ``grid`` is the grid they
        were made for (default: a square).
        """
        state = self.vit.fitted(state, grid) if resample else dict(state)
        advice = "" if resample else "resample=True carries the positions over"
        require_fit(state, self.state(), model=self.architecture, advice=advice)
        self.vit.load_state_dict(state, strict=True)

    def _check_doors(
        self, images: Tensor, *, keep: Tensor | None = None, mask: Tensor | None = None, mask_token: Tensor | None = None
    ) -> None:
        if keep is not None or mask is not None:
            self.spec.refuse_masks("what is asked")
        if keep is not None and mask is not None:
            raise ValueError("keep drops patches and mask replaces them: give one of the two")
        if (mask is None) != (mask_token is None):
            raise ValueError("mask and mask_token belong together: give both or neither")
        size = check_size(tuple(images.shape[-2:]), self.spec.patch, "an image's size")
        if keep is not None and (keep.ndim != 2 or len(keep) != len(images)):
            raise ValueError(f"keep must be [{len(images)}, K], not {list(keep.shape)}")
        if mask is not None and tuple(mask.shape) != (len(images), size[0] * size[1]):
            raise ValueError(f"mask must be [{len(images)}, {size[0] * size[1]}], not {list(mask.shape)}")

    def _split(self, x: Tensor) -> Tokens:
        return Tokens(x[:, : self.spec.prefix], x[:, self.spec.prefix :], class_token=self.spec.class_token)

    def _fix_positions(self) -> None:
        if self.vit.pos_embed is None:
            raise ConfigError(
                f"encoder.positions={self.positions}, but {self.architecture} has no absolute positions; use learned"
            )
        with torch.no_grad():
            self.vit.pos_embed.zero_()
            self.vit.pos_embed[0, self.vit.pos_prefix :].copy_(self.table(self.spec.grid))
        self.vit.pos_embed.requires_grad_(False)


def _pair(size: int | Grid) -> Grid:
    return (size, size) if isinstance(size, int) else tuple(size)
