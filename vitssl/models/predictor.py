"""The masked autoencoder's decoder: a narrow ViT that sees the kept tokens in their places and a mask token everywhere else.

He et al. 2022, section 3.1. It exists during pretraining only, so nothing of it is exported.
"""

from functools import partial
from typing import Literal

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitssl.errors import ConfigError
from vitssl.models.adapters.timm_vit import compile_in_place, run_blocks
from vitssl.models.encoder import Tokens
from vitssl.models.init import init_as_mae
from vitssl.models.positions import sincos_2d
from vitssl.models.spec import EncoderSpec

NORM = partial(nn.LayerNorm, eps=1e-6)


class Decoder(nn.Module):
    """Tokens of the kept patches -> a vector for every patch.

    dim, depth, heads, mlp_ratio: its own transformer; out: numbers per patch. Initialised as in MAE. Positions are the fixed
    sin-cos table of the encoder's grid, zero for prefix tokens, or learned for both (Pixio). Raises ConfigError for a width
    that heads do not divide.
    ``looks``: how many outputs of the encoder's blocks it is to be given beside its tokens (``last_blocks``).
    """

    looks = 0

    def __init__(
        self,
        spec: EncoderSpec,
        *,
        dim: int = 512,
        depth: int = 8,
        heads: int = 16,
        mlp_ratio: float = 4.0,
        positions: Literal["sincos", "learned"] = "sincos",
        out: int,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ConfigError(f"the decoder's width {dim} is not divisible by its {heads} heads; change dim or heads")
        self.prefix = spec.prefix
        self.checkpointing = False
        self.embed = self._embed(spec.dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))  # 3-D as in MAE, where it is weight-decayed
        table = torch.zeros(1, self.prefix + spec.num_patches, dim)  # 3-D as in Pixio, where it is weight-decayed
        if positions == "learned":
            self.pos_embed = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        else:
            table[0, self.prefix :] = sincos_2d(dim, spec.grid)
            self.register_buffer("pos_embed", table, persistent=False)
        self.blocks = nn.Sequential(*(self._block(spec.dim, dim, heads, mlp_ratio) for _ in range(depth)))
        self.norm = NORM(dim)
        self.predict = nn.Linear(dim, out)
        init_as_mae(self)

    @property
    def positions(self) -> Tensor:
        """[N, dim]: those of the patches."""
        return self.pos_embed[0, self.prefix :]

    def forward(self, tokens: Tokens, keep: Tensor, places: Tensor | None = None) -> Tensor:
        """tokens of the K kept patches, keep [B, K] their places -> [B, N, out], in raster order; kept ones included.

        ``places`` [B, M]: which of the others are painted; the rest are not there for the blocks, and 0 in the answer.
        """
        prefix, kept = self.embed(torch.cat([tokens.prefix, tokens.patches], dim=1)).split([self.prefix, keep.shape[1]], dim=1)
        if places is None:
            patches = self.mask_token.expand(len(kept), len(self.positions), -1)  # [B, N, dim]
            patches = patches.scatter(1, _rows(keep, kept.shape[-1]), kept.to(patches.dtype)) + self.positions
        else:
            missing = self.mask_token.to(kept.dtype).expand(len(kept), places.shape[1], -1)
            seats = torch.cat([keep, places], dim=1)  # [B, K + M]
            patches = torch.cat([kept, missing], dim=1) + self.positions[seats]
        x = torch.cat([prefix + self.pos_embed[:, : self.prefix], patches], dim=1)  # [B, R + (N or K + M), dim]
        x, _ = run_blocks(self.blocks, x, checkpointing=self.checkpointing)
        answer = self.predict(self.norm(x[:, self.prefix :]))
        return answer if places is None else self._in_places(answer, seats)

    def compile_blocks(self) -> None:
        """Compile every block in place; state names do not change."""
        compile_in_place(self.blocks)

    def _in_places(self, answer: Tensor, seats: Tensor) -> Tensor:
        """answer [B, M, out] of the patches seats [B, M] -> [B, N, out], 0 elsewhere."""
        empty = answer.new_zeros(len(answer), len(self.positions), answer.shape[-1])
        return empty.scatter(1, _rows(seats, answer.shape[-1]), answer)

    @staticmethod
    def _embed(width: int, dim: int) -> nn.Module:
        return nn.Linear(width, dim)

    @staticmethod
    def _block(width: int, dim: int, heads: int, mlp_ratio: float) -> nn.Module:
        return Block(dim, heads, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=NORM)


def _rows(numbers: Tensor, width: int) -> Tensor:
    """[B, K] -> [B, K, width]: as ``scatter`` wants to be told of whole rows."""
    return numbers[..., None].expand(-1, -1, width)
