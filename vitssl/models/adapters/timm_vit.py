"""timm's ``VisionTransformer`` with one door more: tokens can be dropped or replaced, at any image size.

The modules and parameters of a timm model are taken over under their own names, so the state stays a plain timm state.
They are used inside this module's own ``forward``, so engines that gather a module's parameters around its forward
(FSDP, ZeRO-3) find the class token and the positions in place. No private function of timm is called.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from timm.layers import DropPath, PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitssl.errors import CheckpointError
from vitssl.models.adapters.packing import Block, Packing, pack, packable, unpack
from vitssl.models.positions import Grid, ResampleRule, resample
from vitssl.models.state import by


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


def drop_evenly(blocks: Iterable[nn.Module], rate: float) -> None:
    """Give every block the same stochastic depth; timm's own grows from 0 with the depth."""
    for block in blocks:
        for name in [name for name, _ in block.named_children() if name.startswith("drop_path")]:
            setattr(block, name, DropPath(rate))


def run_blocks(
    blocks: Sequence[nn.Module],
    x: Tensor,
    *,
    beside: Sequence[Mapping[str, Tensor | Packing]] | None = None,
    checkpointing: bool = False,
    last: int = 0,
) -> tuple[Tensor, list[Tensor]]:
    """x [B, T, D], or packed [T, D] -> the output of the last block, and those of the ``last`` blocks (one more than there are:
    x itself is the first). ``beside``: what each is given besides.

    With ``checkpointing`` a block keeps only its input for the backward pass and is computed again there.
    """
    outputs = [x] if last > len(blocks) else []
    for index, block in enumerate(blocks):
        more = {} if beside is None else beside[index]
        again = checkpointing and torch.is_grad_enabled()
        x = checkpoint(block, x, use_reentrant=False, **more) if again else block(x, **more)
        if index >= len(blocks) - last:
            outputs.append(x)
    return x, outputs


class TimmViT(nn.Module):
    """The parts of a timm ``VisionTransformer`` and a forward that can drop or replace tokens.

    ``pos_resample`` names the rule that carries positions to grids other than the model's own. Adapters of other families are
    subclasses; what they share is the way from pixels to tokens, what differs are the words here and :meth:`_beside`.
    """

    model: ClassVar[type[nn.Module]] = VisionTransformer
    names: ClassVar[Mapping[str, str]] = {  # our words -> timm's arguments
        "image_size": "img_size",
        "patch_size": "patch_size",
        "channels": "in_chans",
        "registers": "reg_tokens",
        "class_token": "class_token",
        "drop_path": "drop_path_rate",
        "fc_norm": "fc_norm",
        "final_norm": "final_norm",
    }
    always: ClassVar[Mapping[str, Any]] = {}  # keys that have no argument because there is no choice
    drops: ClassVar[bool] = True  # whether patches can be left out
    fixed: ClassVar[Mapping[str, Any]] = {}  # timm's arguments that the encoder needs

    def __init__(self, model: nn.Module, *, pos_resample: ResampleRule) -> None:
        super().__init__()
        self.cls_token = model.cls_token
        self.reg_token = getattr(model, "reg_token", None)
        self.pos_embed = model.pos_embed
        self.patch_embed = model.patch_embed
        self.pos_drop = nn.Identity() if self.pos_embed is None else model.pos_drop
        self.norm_pre = getattr(model, "norm_pre", nn.Identity())
        self.blocks = model.blocks
        self.norm = model.norm
        self.patch_embed.strict_img_size = False
        self.pos_resample = pos_resample
        self.prefix: int = model.num_prefix_tokens
        self.pos_prefix: int = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
        self.dim: int = model.embed_dim
        self.packs = all(map(packable, self.blocks))
        for block in self.blocks if self.packs else ():
            block.__class__ = Block  # what it holds stays as it is
        self.overlaps = type(model.patch_embed) is not PatchEmbed  # a token has seen pixels of others
        self.patch: Grid = tuple(model.patch_embed.feat_ratio(as_scalar=False))
        self.grid: Grid = tuple(model.patch_embed.grid_size)

    @property
    def rotations(self) -> str:
        """How queries and keys are turned by their place, in words, since no shape tells it."""
        return "none"

    @property
    def any_size(self) -> bool:
        """Whether images of other sizes are served than the one it was made for."""
        return True

    @property
    def any_size_in_a_graph(self) -> bool:
        """Whether a traced graph can serve images of any size, or its positions need the size to be known."""
        return self.pos_embed is None or self.pos_resample != "dino"

    def norm_arguments(self, *, after_pooling: bool) -> dict[str, Any]:
        """How ``timm.create_model`` is told of the final norm that is here, and whether a classifier has one after pooling."""
        return {"fc_norm": after_pooling, "final_norm": after_pooling or not isinstance(self.norm, nn.Identity)}

    def fitted(self, state: Mapping[str, Tensor], grid: Grid | None) -> dict[str, Tensor]:
        """A state whose positions were made for ``grid`` (None: a square) with positions for this model's grid.

        Raises CheckpointError where they are for no such grid.
        """
        state = dict(state)
        if self.pos_embed is None or "pos_embed" not in state:
            return state
        positions = state["pos_embed"]
        num = positions.shape[1] - self.pos_prefix
        grid = grid or (round(max(num, 0) ** 0.5),) * 2
        if num < 1 or grid[0] * grid[1] != num:
            raise CheckpointError(
                f"pos_embed {by(positions)} holds {num} positions beside {self.pos_prefix} for prefix tokens, which is no "
                f"{grid[0]}x{grid[1]} grid; say which grid the weights were made for"
            )
        return state | {"pos_embed": resample(positions, grid, self.grid, self.pos_resample, prefix=self.pos_prefix)}

    def forward(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        last_blocks: int = 0,
        checkpointing: bool = False,
        others: Sequence[Tensor] = (),
    ) -> tuple[Tensor | list[Tensor], list[Tensor]]:
        """images [B, C, H, W] -> tokens after the final norm [B, R + (N or K), D], outputs of the last blocks before it.

        Arguments as in :meth:`vitssl.models.encoder.Encoder.forward`, checked there. With ``others``, images of other sizes
        that pass the blocks together with the first where :attr:`packs`: the list of all their tokens.
        """
        grid = self._grid(images)
        beside = self._beside(grid, keep)
        x = self._embed(images, grid, keep, mask, mask_token)
        if others:
            x, packing = pack([x, *(self._embed(other, self._grid(other), None, None, None) for other in others)])
            x, _ = run_blocks(self.blocks, x, beside=[{"packing": packing}] * len(self.blocks), checkpointing=checkpointing)
            return unpack(self.norm(x), packing), []
        x, outputs = run_blocks(self.blocks, x, beside=beside, checkpointing=checkpointing, last=last_blocks)
        return self.norm(x), outputs

    def attention(self, images: Tensor, blocks: Collection[int]) -> list[Tensor]:
        """Attention probabilities [B, heads, T, T] of the blocks of these numbers, computed again, unfused and uncompiled."""
        grid = self._grid(images)
        x, beside, found = self._embed(images, grid, None, None, None), self._beside(grid, None), []
        for number, block in enumerate(self.blocks):
            attention = block.attn
            if number not in blocks:
                x = block.forward(x, **({} if beside is None else beside[number]))  # not called: that may be compiled
                continue
            hook = attention.attn_drop.register_forward_hook(lambda module, given, probabilities: found.append(probabilities))
            fused, attention.fused_attn = attention.fused_attn, False
            try:
                x = block.forward(x, **({} if beside is None else beside[number]))
            finally:
                attention.fused_attn = fused
                hook.remove()
        return found

    def _grid(self, images: Tensor) -> Grid:
        return images.shape[-2] // self.patch[0], images.shape[-1] // self.patch[1]

    def _beside(self, grid: Grid, keep: Tensor | None) -> Sequence[Mapping[str, Tensor]] | None:
        """What each block is given beside the tokens: nothing here, relative positions in other families."""
        return None

    def _embed(self, images: Tensor, grid: Grid, keep: Tensor | None, mask: Tensor | None, mask_token: Tensor | None) -> Tensor:
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
        return self.norm_pre(self.pos_drop(x))

    def _positions(self, grid: Grid) -> tuple[Tensor | None, Tensor | None]:
        """Positions of the prefix tokens [1, R, D] and of the patches [1, N, D], where the model has them."""
        if self.pos_embed is None:
            return None, None
        positions = resample(self.pos_embed, self.grid, grid, self.pos_resample, prefix=self.pos_prefix)
        return (positions[:, : self.pos_prefix] if self.pos_prefix else None), positions[:, self.pos_prefix :]
