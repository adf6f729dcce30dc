"""CrossMAE's decoder: mask tokens that look at the encoder's tokens and never at each other (Fu et al. 2024, section 3).

The surprising decision: patches painted apart are painted as well as together. So what is painted of one does not depend on
which others are, and painting a part costs that part.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from vitssl.models.adapters.timm_vit import run_blocks
from vitssl.models.encoder import Tokens
from vitssl.models.init import init_as_mae
from vitssl.models.predictor import NORM, Decoder
from vitssl.models.spec import EncoderSpec


class CrossBlock(nn.Module):
    """x [B, M, dim], memory [B, T, D] of the encoder -> [B, M, dim]: attention to the memory alone, then an MLP."""

    def __init__(self, width: int, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = NORM(dim)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(width, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = NORM(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        query = self.q(self.norm1(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, M, dim / heads]
        key, value = self.kv(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class CrossDecoder(Decoder):
    """A :class:`Decoder` of such blocks, whose memory is the encoder's tokens, prefix among them.

    With ``mixing`` it is, for each block, a learnt sum of the outputs of all of the encoder's blocks and of what goes into the
    first, before the final norm, under a norm of its own (section 3.3; ``weight_fm`` and ``use_input`` of the official code).
    """

    def __init__(self, spec: EncoderSpec, *, depth: int = 12, mixing: bool = False, **settings: Any) -> None:
        super().__init__(spec, depth=depth, **settings)
        if mixing:
            self.looks = spec.depth + 1
            self.mix = nn.Linear(self.looks, depth, bias=False)
            self.mixed_norms = nn.ModuleList(NORM(spec.dim) for _ in range(depth))
            init_as_mae(self.mix)

    def forward(self, tokens: Tokens, keep: Tensor, places: Tensor | None = None) -> Tensor:
        """As :meth:`Decoder.forward`, of tokens with ``looks`` outputs of blocks.

        ``places`` are all that is painted and looked at; None: every patch, the kept ones as if they were not.
        """
        seats = torch.arange(len(self.positions), device=keep.device).expand(len(keep), -1) if places is None else places
        x = self.mask_token + self.positions[seats]  # [B, M, dim]
        beside = [{"memory": memory} for memory in self._memories(tokens)]
        x, _ = run_blocks(self.blocks, x, beside=beside, checkpointing=self.checkpointing)
        return self._in_places(self.predict(self.norm(x)), seats)

    def _memories(self, tokens: Tokens) -> list[Tensor]:
        """[B, R + K, D] for each block."""
        last = _joined(tokens)
        if not self.looks:
            return [last] * len(self.blocks)
        outputs = torch.stack([_joined(block) for block in tokens.blocks], dim=-1)  # [B, R + K, D, looks]
        mixed = list(self.mix(outputs).unbind(-1))
        mixed[0] = mixed[0] + 0.0 * last  # DDP waits for the final norm's gradient, and has 0
        return [norm(each) for norm, each in zip(self.mixed_norms, mixed, strict=True)]

    @staticmethod
    def _embed(width: int, dim: int) -> nn.Module:
        return nn.Identity()  # keys and values are made of the encoder's tokens as they are

    @staticmethod
    def _block(width: int, dim: int, heads: int, mlp_ratio: float) -> nn.Module:
        return CrossBlock(width, dim, heads, mlp_ratio)


def _joined(tokens: Tokens) -> Tensor:
    return torch.cat([tokens.prefix, tokens.patches], dim=1)
