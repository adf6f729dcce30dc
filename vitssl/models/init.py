"""How weights begin where timm's own initialisation is not wanted."""

from torch import nn


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
