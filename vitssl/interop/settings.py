"""What transformers' configurations say of our networks: which model has what an encoder has, and with which settings."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitssl.errors import CheckpointError
from vitssl.interop.dinov3 import BASE
from vitssl.interop.names import is_gated
from vitssl.interop.ours import resized


def family_of(state: Mapping[str, Tensor], classifier: bool) -> str:
    """The model_type that has what an encoder has. Raises CheckpointError where none does."""
    class_token, registers = "cls_token" in state, "reg_token" in state
    relative, rotary = any(name.endswith("relative_position_bias_table") for name in state), "blocks.0.gamma_1" in state
    scaled = relative or rotary or "blocks.0.ls1.gamma" in state or is_gated(state)
    if classifier and (registers or scaled or not class_token):
        raise CheckpointError("transformers classifies with plain ViTs alone: no registers, no layer scale, one class token")
    if not class_token and (registers or scaled):
        raise CheckpointError(
            "transformers has no ViT with registers or layer scale that lacks a class token; export --to timm"
        )
    if relative or rotary:
        return "beit" if relative else "dinov3_vit"
    return "dinov2_with_registers" if registers else "dinov2" if scaled else "vit" if class_token else "ijepa"


def settings_of(family: str, state: Mapping[str, Tensor], facts: Mapping[str, Any], ours: nn.Module) -> dict[str, Any]:
    """The configuration of the network that computes what ours does."""
    width, channels, *patch = state["patch_embed.proj.weight"].shape
    inner, gated = state["blocks.0.mlp.fc2.weight"].shape[1], is_gated(state)
    size = facts["image_size"]
    found = {
        "hidden_size": width,
        "num_hidden_layers": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "num_attention_heads": next(part.num_heads for part in ours.modules() if hasattr(part, "num_heads")),
        "image_size": size[0] if size[0] == size[1] else list(size),
        "patch_size": patch[0] if patch[0] == patch[1] else patch,
        "num_channels": channels,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "layer_norm_eps": epsilon_of(ours),
        "hidden_act": "gelu_pytorch_tanh" if facts["arguments"].get("act_layer") == "gelu_tanh" else "gelu",
    }
    if family.startswith("dinov2"):
        found |= {"mlp_ratio": _mlp_ratio(width, inner, gated=gated), "use_swiglu_ffn": gated}
        found |= {"num_register_tokens": state["reg_token"].shape[1]} if "reg_token" in state else {}
    else:
        found["intermediate_size"] = inner
    found |= _dinov3(state, facts, gated) if family == "dinov3_vit" else _beit(state) if family == "beit" else {}
    labels = {"id2label": dict(enumerate(facts["classes"]))} if "classes" in facts else {}
    labels |= {"label2id": {name: index for index, name in enumerate(facts["classes"])}} if labels else {}
    labels |= {"problem_type": "multi_label_classification"} if facts.get("labels") == "several" else {}
    return found | labels


def _dinov3(state: Mapping[str, Tensor], facts: Mapping[str, Any], gated: bool) -> dict[str, Any]:
    biases = "blocks.0.attn.q_bias" in state or "blocks.0.attn.qkv.bias" in state
    return {
        "query_bias": biases,
        "key_bias": "blocks.0.attn.qkv.bias" in state,
        "value_bias": biases,
        "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else "gelu",
        "num_register_tokens": state["reg_token"].shape[1] if "reg_token" in state else 0,
        "rope_theta": float(facts["arguments"].get("rope_temperature", BASE)),
    }


def _beit(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "use_absolute_position_embeddings": "pos_embed" in state,
        "use_relative_position_bias": "blocks.0.attn.relative_position_bias_table" in state,
        "use_shared_relative_position_bias": "rel_pos_bias.relative_position_bias_table" in state,
        "layer_scale_init_value": 0.1 if "blocks.0.gamma_1" in state else 0.0,
        "use_mean_pooling": False,
    }


def _mlp_ratio(width: int, inner: int, *, gated: bool) -> int:
    """The number that DINOv2's configuration needs for MLPs of this inner width. Raises CheckpointError where there is none."""
    for ratio in range(1, 33):
        if inner == ((width * ratio * 2 // 3 + 7) // 8 * 8 if gated else width * ratio):
            return ratio
    raise CheckpointError(f"transformers' DINOv2 has no MLP of {inner} for a width of {width}; export --to timm or --to onnx")


def with_scale(state: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """With the layer scale that DINOv2 always has: 1 where the encoder has none."""
    if not family.startswith("dinov2") or "blocks.0.ls1.gamma" in state:
        return dict(state)
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    ones = torch.ones(state["norm.weight"].shape)
    return dict(state) | {f"blocks.{index}.ls{which}.gamma": ones.clone() for index in blocks for which in (1, 2)}


def processor_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """How images are prepared; for a classifier as its evaluation did, at the size that its weights were made for."""
    height, width = facts["image_size"]
    does = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255, "resample": 3}
    sizes = {"size": {"height": height, "width": width}, "image_mean": facts["mean"], "image_std": facts["std"]}
    if "crop_pct" not in facts:
        return {"image_processor_type": "ViTImageProcessor", **does, **sizes}
    sizes |= {"size": {"shortest_edge": resized((height, width), facts)}, "crop_size": sizes["size"], "do_center_crop": True}
    return {"image_processor_type": "BitImageProcessor", **does, **sizes}  # ViT's own cannot crop


def epsilon_of(model: nn.Module) -> float:
    return next(part.eps for part in model.modules() if isinstance(part, nn.LayerNorm))
