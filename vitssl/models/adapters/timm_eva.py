"""timm's ``Eva``: ViTs whose attention turns queries and keys by their patch's place (RoPE), as DINOv3's, EVA-02's and PE's.

Rotations are computed for the grid of the images given, so any size is served; a kept patch takes the rotation of the place
it came from, whatever its place in the shorter sequence. Prefix tokens are not turned. Surprising: some names (Sapiens2's)
stretch the coordinates at random in training, as DINOv3's authors did; the draws come from torch's global generator, which is
seeded with every step, and an average of the weights, being in evaluation mode, sees none.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from timm.layers import RotaryEmbeddingDinoV3
from timm.models.eva import Eva
from torch import Tensor, nn

from vitssl.models.adapters.timm_vit import TimmViT
from vitssl.models.positions import Grid, ResampleRule

_GRIDS = 64  # whose tables are kept
_TOLD = ("temperature", "grid_offset", "grid_indexing", "rotate_half", "normalize_coords", "ref_feat_shape", "mrope_section")


class TimmEva(TimmViT):
    """The parts of a timm ``Eva``, with or without absolute positions beside the rotary ones."""

    model: ClassVar[type[nn.Module]] = Eva
    names: ClassVar[Mapping[str, str]] = TimmViT.names | {
        "registers": "num_reg_tokens",
        "fc_norm": "use_fc_norm",
        "final_norm": "use_post_transformer_norm",
    }
    fixed: ClassVar[Mapping[str, Any]] = {"dynamic_img_size": True}  # else some kinds of RoPE know a single grid

    def __init__(self, model: Eva, *, pos_resample: ResampleRule) -> None:
        super().__init__(model, pos_resample=pos_resample)
        self.pos_drop = model.pos_drop
        self.rope = model.rope
        self.rope_mixed: bool = model.rope_mixed
        self._tables: dict[tuple[Grid, torch.device, torch.dtype], Tensor] = {}

    @property
    def rotations(self) -> str:
        told = {key: getattr(self.rope, key, None) for key in _TOLD}
        said = ", ".join(f"{key} {value}" for key, value in told.items() if value is not None)
        return "none" if self.rope is None else f"{type(self.rope).__name__} of {said}"

    @property
    def any_size_in_a_graph(self) -> bool:
        return super().any_size_in_a_graph and not isinstance(self.rope, RotaryEmbeddingDinoV3)

    def norm_arguments(self, *, after_pooling: bool) -> dict[str, Any]:
        here = not isinstance(self.norm, nn.Identity)
        return {"use_fc_norm": after_pooling, "use_post_transformer_norm": here}

    def _beside(self, grid: Grid, keep: Tensor | None) -> Sequence[Mapping[str, Tensor]] | None:
        """Sines and cosines: one table for all blocks, or with mixed RoPE, which is learned, one a block and head."""
        if self.rope is None:
            return None
        table = self._table(grid)  # [N, 2 x width of a head], or [blocks, heads, N, 2 x width of a head]
        tables = table.unbind(0) if self.rope_mixed else [table] * len(self.blocks)
        if keep is not None:
            kept = _kept(table, keep) if not self.rope_mixed else None
            tables = [_kept(each, keep) for each in tables] if kept is None else [kept] * len(self.blocks)
        return [{"rope": each} for each in tables]

    def _table(self, grid: Grid) -> Tensor:
        """Sines and cosines of a grid, kept where they will be the same: timm makes them from numbers on the host, for whose
        copy a GPU would wait in every forward.
        """
        changing = self.rope_mixed or (self.training and self.rope.aug_active)
        if changing or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return self.rope.get_embed(shape=list(grid))
        made_of = next(self.rope.buffers())
        key = (grid, made_of.device, made_of.dtype)
        if key not in self._tables:
            if len(self._tables) == _GRIDS:
                self._tables.clear()
            self._tables[key] = self.rope.get_embed(shape=list(grid))
        return self._tables[key]


def _kept(table: Tensor, keep: Tensor) -> Tensor:
    """Rows of a table ([N, W] or [heads, N, W]) for each sample's kept patches [B, K] -> [B, 1 or heads, K, W]."""
    heads = table[None] if table.ndim == 2 else table
    return heads[:, keep].transpose(0, 1)
