"""Sequences of several lengths in one pass: crops of 224 and of 96 pixels share every matrix product (DINOv2, section 5).

Tokens of all sequences lie one after the other, [T, D]; what works on single tokens (norms, products, MLPs) never sees where
one ends. Attention stays within a sequence: one kernel of variable lengths where torch has it (CUDA, half precision), else a
call for each length, which gives the same numbers. Stochastic depth drops whole sequences, as it does of a batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None


class Packing(NamedTuple):
    """How packed tokens lie, worked out once for all blocks."""

    sizes: tuple[tuple[int, int], ...]  # (number of sequences, tokens of each), in the order they lie in
    lengths: Tensor  # [S] int64: tokens of every sequence
    starts: Tensor  # [S + 1] int32: where each begins, and where the last ends


def pack(parts: Sequence[Tensor]) -> tuple[Tensor, Packing]:
    """[B, T, D] of several B and T -> ([sum of B x T, D], how they lie)."""
    x, sizes = torch.cat([part.flatten(0, 1) for part in parts]), tuple((part.shape[0], part.shape[1]) for part in parts)
    lengths = torch.cat([torch.full((num,), length, device=x.device) for num, length in sizes])
    return x, Packing(sizes, lengths, F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)))


def unpack(x: Tensor, packing: Packing) -> list[Tensor]:
    """The inverse of :func:`pack`."""
    parts = x.split([num * length for num, length in packing.sizes])
    return [part.unflatten(0, size) for part, size in zip(parts, packing.sizes, strict=True)]


def packable(block: nn.Module) -> bool:
    """Whether this is timm's plain block, of which :class:`Block` knows what it computes."""
    return type(block) is TimmBlock and type(block.attn) is Attention


class Block(TimmBlock):
    """timm's that also takes packed tokens; its parameters and their names are timm's."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *, packing: Packing | None = None
    ) -> Tensor:
        """[B, T, D] as timm's; with ``packing`` packed tokens [T, D]."""
        if packing is None:
            return super().forward(x, attn_mask, is_causal)
        x = x + _by_sequence(self.drop_path1, self.ls1(_attend(self.attn, self.norm1(x), packing)), packing)
        return x + _by_sequence(self.drop_path2, self.ls2(self.mlp(self.norm2(x))), packing)


def _attend(attention: Attention, x: Tensor, packing: Packing) -> Tensor:
    """timm's attention within each sequence."""
    gate = attention.gate(x).sigmoid() if attention.gate is not None else None
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, attention.head_dim)).unbind(1)  # [T, heads, d]
    q, k = attention.q_norm(q), attention.k_norm(k)
    if attention.fused_attn and not (attention.training and attention.attn_drop.p) and _has_kernel(v):
        longest = max(length for _, length in packing.sizes)
        found = varlen_attn(q.to(v.dtype), k.to(v.dtype), v, packing.starts, packing.starts, longest, longest)
    else:
        found = torch.cat([_within(attention, *parts) for parts in zip(*(unpack(each, packing) for each in (q, k, v)))])
    found = attention.norm(found.flatten(1))
    return attention.proj_drop(attention.proj(found if gate is None else found * gate))


def _has_kernel(x: Tensor) -> bool:
    """Whether torch's attention of variable lengths takes x [T, heads, d]: FlashAttention's terms."""
    if varlen_attn is None or not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0) and x.shape[-1] % 8 == 0 and x.shape[-1] <= 256


def _within(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, T, heads, d] -> [B x T, heads, d], fused or not as timm's would be."""
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    if attention.fused_attn:
        found = F.scaled_dot_product_attention(q, k, v, dropout_p=attention.attn_drop.p if attention.training else 0.0)
    else:
        found = attention.attn_drop((q * attention.scale @ k.mT).softmax(dim=-1)) @ v
    return found.transpose(1, 2).flatten(0, 1)


def _by_sequence(drop: nn.Module, x: Tensor, packing: Packing) -> Tensor:
    """Stochastic depth of a batch, applied to packed tokens: a sequence stays or goes as a whole."""
    if not drop.training or isinstance(drop, nn.Identity):
        return x
    kept = drop(x.new_ones(len(packing.lengths), 1))
    return x * kept.repeat_interleave(packing.lengths, dim=0, output_size=len(x))
