"""A distilled classifier under the names that timm's DeiT has for it: its register is their distillation token."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitssl.errors import CheckpointError
from vitssl.models.adapters.timm_vit import TimmViT
from vitssl.models.encoder import Encoder

ARCHITECTURE = "deit_base_distilled_patch16_224"


def is_distilled(facts: Mapping[str, Any]) -> bool:
    return bool(facts.get("head", {}).get("distilled"))


def under_deit(
    state: Mapping[str, Tensor], facts: Mapping[str, Any], encoder: Encoder
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state, facts) of timm's VisionTransformerDistilled. Raises CheckpointError where it has no place for something.

    What an architecture has beyond its width, depth and heads is not carried over: whoever loads it compares outputs.
    """
    spec = encoder.spec
    if type(encoder.vit) is not TimmViT:
        raise CheckpointError(f"timm's DeiT is a plain ViT, and {facts['architecture']} is not; export --to onnx")
    if facts["pooling"] != "class" or "fc_norm.weight" in state:
        raise CheckpointError(
            "timm's DeiT reads the class token after the final norm, and this distilled classifier the mean over patches;"
            " export --to onnx, or fine-tune with head.pooling=class"
        )
    if not spec.class_token or spec.prefix != 2:
        raise CheckpointError(
            f"timm's DeiT has a class token and a distillation token, and this encoder {spec.prefix} tokens before its patches;"
            " export --to onnx"
        )
    named = {"dist_token" if name == "reg_token" else name: tensor for name, tensor in state.items()}
    shape = {"embed_dim": spec.dim, "depth": spec.depth, "num_heads": spec.heads, "patch_size": list(spec.patch)}
    kept = {key: value for key, value in facts["arguments"].items() if key not in ("reg_tokens", "class_token")}
    return named, {**facts, "architecture": ARCHITECTURE, "arguments": kept | shape}
