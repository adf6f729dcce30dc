"""How weights begin where timm's own initialisation is not wanted."""

import math
import re

from torch import Tensor, nn


def init_as_mae(module: nn.Module) -> None:
    """MAE's initialisation (He et al. 2022, appendix A.1, after the official code), in place, of an encoder or a decoder.

    Linear layers Xavier-uniform with zero bias; LayerNorms one and zero; the patch embedding Xavier-uniform as the linear
    layer it is, with torch's default bias; class, register and mask tokens N(0, 0.02).
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm) and part.elementwise_affine:
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Conv2d) and name.endswith("patch_embed.proj"):
            nn.init.xavier_uniform_(part.weight.view(len(part.weight), -1))
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2] in ("cls_token", "reg_token", "mask_token"):
            nn.init.normal_(parameter, std=0.02)


def init_as_moco_v3(module: nn.Module) -> None:
    """MoCo v3's initialisation of an encoder (Chen et al. 2021, after the official code), in place.

    Linear layers Xavier-uniform with zero bias, queries, keys and values as the three matrices they are; the patch embedding
    Xavier-uniform with zero bias, its fan-out that of one place; class and register tokens N(0, 1e-6).
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            each = part.weight.chunk(3) if name.endswith(".qkv") else [part.weight]
            for matrix in each:
                nn.init.xavier_uniform_(matrix)
        elif isinstance(part, nn.Conv2d) and name.endswith("patch_embed.proj"):
            nn.init.xavier_uniform_(part.weight.view(len(part.weight), -1))
        else:
            continue
        if part.bias is not None:
            nn.init.zeros_(part.bias)
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2] in ("cls_token", "reg_token"):
            nn.init.normal_(parameter, std=1e-6)


def init_as_dino(module: nn.Module) -> None:
    """DINO's and iBOT's initialisation of an encoder (official codes), in place: timm's, but for prefix tokens N(0, 0.02)."""
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2] in ("cls_token", "reg_token"):
            nn.init.trunc_normal_(parameter, std=0.02)


def init_as_dinov2(module: nn.Module) -> None:
    """DINOv2's initialisation of an encoder (Oquab et al. 2024, after the official code), in place: timm's, but for two parts.

    The gates of SwiGLU are linear layers N(0, 0.02) like the others. Registers, without positions there, have zeros here.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    vit = module.vit
    if vit.pos_embed is not None:
        vit.pos_embed.data[:, int(vit.cls_token is not None) : vit.pos_prefix] = 0.0


def init_as_msn(module: nn.Module) -> None:
    """MSN's initialisation of an encoder (official code), in place: DINO's, and the patch embedding He-normal, no bias."""
    init_as_dino(module)
    for name, part in module.named_modules():
        if isinstance(part, nn.Conv2d) and name.endswith("patch_embed.proj"):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            nn.init.zeros_(part.bias)


def init_as_beit(module: nn.Module) -> None:
    """BEiT's initialisation of an encoder (Bao et al. 2022; official codes of SimMIM and data2vec), in place.

    Linear layers, patch embedding, tokens and learned positions by :func:`narrow_normal`, without bias; what a block adds is
    divided by the square root of twice its number, from 1. timm's own of that family is not cut, so 1.85 times as wide.
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear) or (isinstance(part, nn.Conv2d) and name.endswith("patch_embed.proj")):
            narrow_normal(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2] in ("cls_token", "reg_token", "pos_embed"):
            narrow_normal(parameter)
        elif found := re.search(r"blocks\.(\d+)\.(?:attn\.proj|mlp\.fc2)\.weight$", name):
            parameter.data.div_(math.sqrt(2.0 * (int(found[1]) + 1)))


def narrow_normal(tensor: Tensor) -> None:
    """N(0, 0.02) cut at one deviation, in place, which leaves a deviation of 0.0108 (BEiT's ``trunc_normal_``)."""
    nn.init.trunc_normal_(tensor, std=0.02, a=-0.02, b=0.02)


def init_as_jepa(module: nn.Module) -> None:
    """I-JEPA's initialisation (official code, ``init_model``), in place, of an encoder or a predictor.

    Linear layers, patch embedding and mask tokens N(0, 0.02), no bias. Its classes also scale down what deeper blocks add, as
    BEiT's do, but ``init_model`` then draws all linear layers anew.
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear) or (isinstance(part, nn.Conv2d) and name.endswith("patch_embed.proj")):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2] == "mask_token":
            nn.init.trunc_normal_(parameter, std=0.02)
