"""timm's ``VisionTransformer`` with one door more: tokens can be dropped or replaced, at any image size.

The modules and parameters of a timm model are taken over under their own names, so the state stays a plain timm state.
They are used inside this module's own ``forward``, so engines that gather a module's parameters around its forward
(FSDP, ZeRO-3) find the class token and the positions in place. No private function of timm is called.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitssl.errors import ConfigError
from vitssl.models.positions import Grid, ResampleRule, resample

OWN_KEYS = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "channels",
    "reg_tokens": "registers",
    "class_token": "class_token",
    "drop_path_rate": "drop_path",
    "num_classes": None,
    "global_pool": None,
    "fc_norm": None,
    "final_norm": None,
    "patch_drop_rate": None,
    "dynamic_img_pad": None,
    "pretrained": None,
    "checkpoint_path": None,
}
"""timm arguments that are not the user's to give: those with a key of their own, and those that belong to the encoder."""


def build(name: str, arguments: dict[str, Any], *, drop_path: float = 0.0) -> VisionTransformer:
    """A freshly initialised timm model without pooling and head. Raises ConfigError in one line for what is not supported."""
    known = timm.list_models(module="vision_transformer")
    if not timm.is_model(name):
        raise ConfigError(f"encoder.name={name!r}: timm {timm.__version__} has no such model; {_nearest(name, known)}")
    try:
        model = timm.create_model(name, num_classes=0, global_pool="", fc_norm=False, drop_path_rate=drop_path, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError, AttributeError) as error:
        with torch.device("meta"):  # another kind of model explains more than its complaint; this costs no memory
            _require_plain(timm.create_model(name), name, known)
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise ConfigError(f"encoder.name={name!r}: timm cannot build it with {arguments}: {reason}") from error
    _require_plain(model, name, known)
    return model


def compile_in_place(blocks: Iterable[nn.Module]) -> None:
    """Compile each block where it stands: state names do not change, and later shapes never become dynamic.

    All blocks share one code object, so each drop-path rate, image size and mode takes one entry of the same cache; its
    limit (8 in torch) is raised, since beyond it blocks would silently run uncompiled.
    """
    blocks = list(blocks)
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 8 * len(blocks))
    for block in blocks:
        block.compile(dynamic=False)


def fuse_attention(module: nn.Module, fused: bool) -> None:
    """Choose torch's fused attention, or two matrix products and a softmax, for every timm attention inside ``module``."""
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused


def run_blocks(
    blocks: Sequence[nn.Module], x: Tensor, *, checkpointing: bool = False, last: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """x [B, T, D] -> the output of the last block, and those of the ``last`` blocks.

    With ``checkpointing`` a block keeps only its input for the backward pass and is computed again there.
    """
    outputs = []
    for index, block in enumerate(blocks):
        x = checkpoint(block, x, use_reentrant=False) if checkpointing and torch.is_grad_enabled() else block(x)
        if index >= len(blocks) - last:
            outputs.append(x)
    return x, outputs


class TimmViT(nn.Module):
    """The parts of a timm ``VisionTransformer`` and a forward that can drop or replace tokens.

    ``pos_resample`` names the rule that carries positions to grids other than the model's own.
    """

    def __init__(self, model: VisionTransformer, *, pos_resample: ResampleRule) -> None:
        super().__init__()
        self.cls_token = model.cls_token
        self.reg_token = model.reg_token
        self.pos_embed = model.pos_embed
        self.patch_embed = model.patch_embed
        self.pos_drop = model.pos_drop
        self.norm_pre = model.norm_pre
        self.blocks = model.blocks
        self.norm = model.norm
        self.patch_embed.strict_img_size = False
        self.pos_resample = pos_resample
        self.prefix: int = model.num_prefix_tokens
        self.pos_prefix: int = 0 if model.no_embed_class else model.num_prefix_tokens
        self.patch: Grid = tuple(model.patch_embed.patch_size)
        self.grid: Grid = tuple(model.patch_embed.grid_size)

    def forward(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        last_blocks: int = 0,
        checkpointing: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """images [B, C, H, W] -> tokens after the final norm [B, R + (N or K), D], outputs of the last blocks before it.

        Arguments as in :meth:`vitssl.models.encoder.Encoder.forward`, checked there.
        """
        x = self._embed(images, keep, mask, mask_token)
        x, outputs = run_blocks(self.blocks, x, checkpointing=checkpointing, last=last_blocks)
        return self.norm(x), outputs

    def _embed(self, images: Tensor, keep: Tensor | None, mask: Tensor | None, mask_token: Tensor | None) -> Tensor:
        grid = (images.shape[-2] // self.patch[0], images.shape[-1] // self.patch[1])
        x = self.patch_embed(images)
        x = x.flatten(1, 2) if x.ndim == 4 else x  # [B, N, D]; a map when the model was made with dynamic_img_size
        if mask is not None:
            x = torch.where(mask[..., None], mask_token, x)
        own, patches = self._positions(grid)
        x = x if patches is None else x + patches
        if keep is not None:
            x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))  # [B, K, D]
        prefix = [token for token in (self.cls_token, self.reg_token) if token is not None]
        if prefix:
            tokens = torch.cat(prefix, dim=1) if own is None else torch.cat(prefix, dim=1) + own
            # x.shape[0], not len(x), which a graph made for other programs would keep as a constant
            x = torch.cat([tokens.expand(x.shape[0], -1, -1), x], dim=1)  # [B, R + K, D]
        x = x if self.pos_embed is None else self.pos_drop(x)
        return self.norm_pre(x)

    def _positions(self, grid: Grid) -> tuple[Tensor | None, Tensor | None]:
        """Positions of the prefix tokens [1, R, D] and of the patches [1, N, D], where the model has them."""
        if self.pos_embed is None:
            return None, None
        positions = resample(self.pos_embed, self.grid, grid, self.pos_resample, prefix=self.pos_prefix)
        return (positions[:, : self.pos_prefix] if self.pos_prefix else None), positions[:, self.pos_prefix :]


def _require_plain(model: nn.Module, name: str, known: list[str]) -> None:
    """Raises ConfigError for other models, and for subclasses and stems whose tokens this adapter would not know."""
    if type(model) is not VisionTransformer or type(model.patch_embed) is not PatchEmbed:
        found = f"{type(model).__name__} with {type(getattr(model, 'patch_embed', None)).__name__}"
        raise ConfigError(
            f"encoder.name={name!r} is a {found}; only a plain VisionTransformer is served; {_nearest(name, known)}"
        )


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or ["vit_small_patch16_224", "vit_base_patch16_224"]
    return f"the nearest supported: {', '.join(near)}"
