"""The masked autoencoder's decoder: a narrow ViT that sees the kept tokens in their places and a mask token everywhere else.

He et al. 2022, section 3.1. It exists during pretraining only, so nothing of it is exported.
"""

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitssl.errors import ConfigError
from vitssl.models.adapters.timm_vit import compile_in_place, run_blocks
from vitssl.models.encoder import EncoderSpec, Tokens
from vitssl.models.init import init_as_mae
from vitssl.models.positions import sincos_2d


class Decoder(nn.Module):
    """Tokens of the kept patches -> a vector for every patch.

    dim, depth, heads, mlp_ratio: its own transformer; out: numbers per patch. Initialised as in MAE. Positions are the fixed
    sin-cos table of the encoder's grid, zero for prefix tokens. Raises ConfigError for a width that heads do not divide.
    """

    def __init__(
        self, spec: EncoderSpec, *, dim: int = 512, depth: int = 8, heads: int = 16, mlp_ratio: float = 4.0, out: int
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ConfigError(f"the decoder's width {dim} is not divisible by its {heads} heads; change dim or heads")
        self.prefix = spec.prefix
        self.checkpointing = False
        self.embed = nn.Linear(spec.dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))  # 3-D as in MAE, where it is weight-decayed
        self.register_buffer("positions", sincos_2d(dim, spec.grid).to(torch.get_default_dtype()), persistent=False)  # [N, dim]
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.Sequential(
            *(Block(dim, heads, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        )
        self.norm = norm(dim)
        self.predict = nn.Linear(dim, out)
        init_as_mae(self)

    def forward(self, tokens: Tokens, keep: Tensor) -> Tensor:
        """tokens of the K kept patches, keep [B, K] their places -> [B, N, out], in raster order; kept ones included."""
        prefix, kept = self.embed(torch.cat([tokens.prefix, tokens.patches], dim=1)).split([self.prefix, keep.shape[1]], dim=1)
        patches = self.mask_token.expand(len(kept), len(self.positions), -1)  # [B, N, dim]
        places = keep[..., None].expand(-1, -1, kept.shape[-1])
        patches = patches.scatter(1, places, kept.to(patches.dtype)) + self.positions
        x = torch.cat([prefix, patches], dim=1)  # [B, R + N, dim]
        x, _ = run_blocks(self.blocks, x, checkpointing=self.checkpointing)
        return self.predict(self.norm(x[:, self.prefix :]))

    def compile_blocks(self) -> None:
        """Compile every block in place; state names do not change."""
        compile_in_place(self.blocks)
