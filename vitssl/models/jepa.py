"""I-JEPA's predictor: a narrow ViT that is shown a context and asked what a block of other patches looks like, as features.

Assran et al. 2023, section 3. Each target block is a sequence of its own, so blocks do not see each other.
"""

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitssl.errors import ConfigError
from vitssl.models.adapters.timm_vit import compile_in_place, run_blocks
from vitssl.models.init import init_as_jepa
from vitssl.models.positions import sincos_2d
from vitssl.models.spec import EncoderSpec


class Predictor(nn.Module):
    """Tokens of a context -> features at the places of target blocks; positions are fixed, and prefix tokens are not shown.

    dim, depth, heads, mlp_ratio: its own transformer. Raises ConfigError for a width that heads do not divide.
    """

    def __init__(self, spec: EncoderSpec, *, dim: int = 384, depth: int = 12, heads: int = 12, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        if dim % heads:
            raise ConfigError(f"the predictor's width {dim} is not divisible by its {heads} heads; change dim or heads")
        self.checkpointing = False
        self.embed = nn.Linear(spec.dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))  # 3-D as in the official code, where it is weight-decayed
        self.register_buffer("positions", sincos_2d(dim, spec.grid).to(torch.get_default_dtype()), persistent=False)  # [N, dim]
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.Sequential(
            *(Block(dim, heads, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        )
        self.norm = norm(dim)
        self.predict = nn.Linear(dim, spec.dim)
        init_as_jepa(self)

    def forward(self, context: Tensor, keep: Tensor, targets: Tensor) -> Tensor:
        """context [B, K, D] of the patches keep [B, K]; targets [B, M, n] places -> [B, M, n, D]."""
        num = targets.shape[1]
        shown = self.embed(context) + self.positions[keep]  # [B, K, dim]
        asked = (self.mask_token + self.positions[targets]).flatten(0, 1)  # [B * M, n, dim]
        x = torch.cat([shown.repeat_interleave(num, dim=0), asked], dim=1)
        x, _ = run_blocks(self.blocks, x, checkpointing=self.checkpointing)
        return self.predict(self.norm(x[:, keep.shape[1] :])).unflatten(0, (-1, num))

    def compile_blocks(self) -> None:
        """Compile every block in place; state names do not change."""
        compile_in_place(self.blocks)
