"""MAE as one writes it in an afternoon: plain timm blocks, eager, no adapter. The yardstick of ``--bench step``."""

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitssl.losses.pixels import masked_mse, normalize_patches, patchify
from vitssl.models.positions import sincos_2d
from vitssl.models.spec import EncoderSpec


class PlainMAE(nn.Module):
    """An encoder and a decoder of the given shapes over images [B, C, H, W]; ``forward(images, noise [B, N])`` -> loss."""

    def __init__(self, spec: EncoderSpec, *, num_keep: int, dim: int, depth: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.patch, self.num_keep = spec.patch, num_keep
        self.embed = nn.Conv2d(spec.channels, spec.dim, spec.patch, stride=spec.patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, spec.dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", sincos_2d(spec.dim, spec.grid).float()[None])
        self.register_buffer("decoder_positions", sincos_2d(dim, spec.grid).float()[None])
        self.blocks = nn.Sequential(*(Block(spec.dim, spec.heads, 4.0, qkv_bias=True) for _ in range(spec.depth)))
        self.norm = nn.LayerNorm(spec.dim)
        self.narrow = nn.Linear(spec.dim, dim)
        self.decoder = nn.Sequential(*(Block(dim, heads, mlp_ratio, qkv_bias=True) for _ in range(depth)))
        self.decoder_norm = nn.LayerNorm(dim)
        self.predict = nn.Linear(dim, spec.patch[0] * spec.patch[1] * spec.channels)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Scalar loss on the removed patches, targets normalised per patch."""
        shuffled = noise.argsort(dim=1)
        restore, keep = shuffled.argsort(dim=1), shuffled[:, : self.num_keep]
        x = self.embed(images).flatten(2).transpose(1, 2) + self.positions  # [B, N, D]
        x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))  # [B, K, D]
        x = self.norm(self.blocks(torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)))
        x = self.narrow(x)
        missing = self.mask_token.expand(len(x), noise.shape[1] - self.num_keep, -1).to(x.dtype)
        patches = torch.cat([x[:, 1:], missing], dim=1)
        patches = patches.gather(1, restore[..., None].expand(-1, -1, x.shape[-1])) + self.decoder_positions  # [B, N, dim]
        x = self.predict(self.decoder_norm(self.decoder(torch.cat([x[:, :1], patches], dim=1))))[:, 1:]
        target, _, _ = normalize_patches(patchify(images, self.patch))
        mask = torch.ones_like(noise, dtype=torch.bool).scatter_(1, keep, False)
        return masked_mse(x, target, mask)
