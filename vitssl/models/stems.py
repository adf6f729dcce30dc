"""Tokens-to-Token, a stem of overlapping patches (Yuan et al. 2021), in the place of a ViT's patch embedding.

Patches of 7x7 pixels at every fourth one become tokens, attend to each other, and are laid out as a map again, of which patches
of 3x3 tokens are the next ones, twice: a token of 16x16 pixels has seen its neighbours'. Surprising in the official code: the
first attention's skip is its values, not its input (whose width is another), and it is scaled by the width of that input.
"""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vitssl.models.positions import Grid

_SIDE = 16  # pixels of a token


class TokensToToken(nn.Module):
    """images [B, C, H, W] -> tokens [B, N, D], one for 16x16 pixels; of ``width`` before they are projected.

    Names are the official code's below ``tokens_to_token`` (token transformers; its performers are another network).
    """

    def __init__(self, image_size: Grid, *, channels: int, dim: int, width: int = 64) -> None:
        super().__init__()
        self.patch_size, self.strict_img_size = (_SIDE, _SIDE), False
        self.grid_size = (image_size[0] // _SIDE, image_size[1] // _SIDE)
        self.attention1 = _TokenTransformer(channels * 7 * 7, width)
        self.attention2 = _TokenTransformer(width * 3 * 3, width)
        self.project = nn.Linear(width * 3 * 3, dim)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def feat_ratio(self, as_scalar: bool = True) -> Grid | int:
        """Pixels of a token, as timm's stems say it."""
        return _SIDE if as_scalar else self.patch_size

    def forward(self, images: Tensor) -> Tensor:
        rows, columns = (pixels // 4 for pixels in images.shape[-2:])
        tokens = F.unfold(images, 7, stride=4, padding=2).transpose(1, 2)  # [B, rows x columns, C x 49]
        tokens = _map(self.attention1(tokens), rows, columns)
        tokens = F.unfold(tokens, 3, stride=2, padding=1).transpose(1, 2)  # [B, a quarter of them, 9 x width]
        tokens = _map(self.attention2(tokens), rows // 2, columns // 2)
        return self.project(F.unfold(tokens, 3, stride=2, padding=1).transpose(1, 2))


def stem_of(facts: Mapping[str, Any]) -> str | None:
    """What an export says it has in the place of timm's patch embedding."""
    return facts.get("stem") or facts.get("encoder", {}).get("stem")


class _TokenTransformer(nn.Module):
    """[B, T, into] -> [B, T, width]: a block of one head that changes the width."""

    def __init__(self, into: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(into)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(into, 3 * width, bias=False), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, width), "fc2": nn.Linear(width, width)})
        self.scale = into**-0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=self.scale)[:, 0]
        x = v + self.attn["proj"](attended)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


def _map(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """[B, T, W] -> [B, W, rows, columns]."""
    return tokens.transpose(1, 2).unflatten(2, (rows, columns))
