"""The encoder section that a state under timm's names says by its shapes: for a VisionTransformer, an Eva, a Beit."""

from typing import Any

from torch import Tensor

from vitssl.errors import CheckpointError
from vitssl.models.positions import Grid

State = dict[str, Tensor]
_VIT = {  # (width, depth) -> timm's name
    (192, 12): "vit_tiny_patch16_224",
    (384, 12): "vit_small_patch16_224",
    (768, 12): "vit_base_patch16_224",
    (1024, 24): "vit_large_patch16_224",
    (1280, 32): "vit_huge_patch14_224",
    (1408, 40): "vit_giant_patch14_224",
    (1536, 40): "vit_giant_patch14_dinov2",
}
_GATED = "vit_giant_patch14_dinov2"  # timm's one plain VisionTransformer whose MLP is gated (SwiGLU)
_DINOV3 = {  # (width, depth, MLP's inner width, gated) -> timm's names without and with biases of queries and values
    (192, 12, 768, False): (None, "vit_tiny_patch16_dinov3_qkvb"),
    (384, 12, 1536, False): ("vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb"),
    (384, 12, 1536, True): ("vit_small_plus_patch16_dinov3", "vit_small_plus_patch16_dinov3_qkvb"),
    (768, 12, 3072, False): ("vit_base_patch16_dinov3", "vit_base_patch16_dinov3_qkvb"),
    (1024, 24, 4096, False): ("vit_large_patch16_dinov3", "vit_large_patch16_dinov3_qkvb"),
    (1280, 32, 5120, True): ("vit_huge_plus_patch16_dinov3", "vit_huge_plus_patch16_dinov3_qkvb"),
    (4096, 40, 8192, True): ("vit_7b_patch16_dinov3", None),
}
_SIDE = 14  # patches, where nothing says an image's size: 224 pixels in patches of 16


def section_of(state: State, *, heads: int | None = None, grid: Grid | None = None) -> dict[str, Any]:
    """The encoder section that builds a network for a state under timm's names. Raises CheckpointError where it cannot.

    ``grid``: rows and columns of its positions, where they are known (default: a square).
    """
    width, channels, *patch = state["patch_embed.proj.weight"].shape
    depth = _depth(state)
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    gated = hidden != state["blocks.0.mlp.fc2.weight"].shape[1]
    name = _VIT.get((width, depth), "vit_base_patch16_224")
    named = (width, depth) in _VIT and gated == (name == _GATED)
    name = name if named else _GATED if gated else "vit_base_patch16_224"
    arguments: dict[str, Any] = {} if named else {"embed_dim": width, "depth": depth}
    heads = _heads(width) if heads is None and arguments else heads
    if heads is not None:
        arguments["num_heads"] = heads
    class_token, registers = "cls_token" in state, state["reg_token"].shape[1] if "reg_token" in state else 0
    if not (gated and named):
        arguments |= (
            {} if hidden == 4 * width and name not in (_GATED, "vit_giant_patch14_224") else {"mlp_ratio": hidden / width}
        )
    arguments |= {"init_values": 1e-5} if "blocks.0.ls1.gamma" in state else {}
    arguments |= {} if "blocks.0.attn.qkv.bias" in state else {"qkv_bias": False}
    arguments |= {"no_embed_class": True} if registers else {}
    grid = grid or _grid(state["pos_embed"].shape[1] - (class_token and not registers))
    size = [side * pixels for side, pixels in zip(grid, patch, strict=True)]
    own = {"patch_size": patch, "channels": channels, "registers": registers, "class_token": class_token}
    return {"name": name, "image_size": size, **own, "arguments": arguments}


def dinov3_section_of(state: State, *, heads: int | None = None, grid: Grid | None = None) -> dict[str, Any]:
    """As :func:`section_of` for an ``Eva`` with rotary positions alone. ``grid`` is nothing that its weights depend on."""
    width, channels, *patch = state["patch_embed.proj.weight"].shape
    depth, gated = _depth(state), "blocks.0.mlp.fc1_g.weight" in state
    hidden, biases = state["blocks.0.mlp.fc2.weight"].shape[1], "blocks.0.attn.q_bias" in state
    name = _DINOV3.get((width, depth, hidden, gated), (None, None))[biases]
    arguments: dict[str, Any] = {}
    if name is None:
        name = "vit_small_plus_patch16_dinov3" if gated else "vit_small_patch16_dinov3"
        arguments = {"embed_dim": width, "depth": depth, "mlp_ratio": _ratio(hidden, width), "qkv_bias": biases}
        arguments |= {"swiglu_align_to": 1} if gated else {}
        heads = heads or _heads(width)
    arguments |= {} if heads is None else {"num_heads": heads}
    if "blocks.0.attn.qkv.bias" in state:
        arguments |= {"attn_type": "rope", "qkv_bias": True}  # timm's attention that has a bias of keys too
    size = [side * pixels for side, pixels in zip(grid or (_SIDE, _SIDE), patch, strict=True)]
    own = {"patch_size": patch, "channels": channels, "registers": state["reg_token"].shape[1] if "reg_token" in state else 0}
    return {"name": name, "image_size": size, **own, "class_token": True, "arguments": arguments}


def beit_section_of(state: State, *, heads: int | None = None, grid: Grid | None = None) -> dict[str, Any]:
    """As :func:`section_of` for a ``Beit``, whose tables say heads and, for squares, the grid."""
    width, channels, *patch = state["patch_embed.proj.weight"].shape
    hidden, shared = state["blocks.0.mlp.fc1.weight"].shape[0], "rel_pos_bias.relative_position_bias_table" in state
    table = next((tensor for name, tensor in state.items() if name.endswith("relative_position_bias_table")), None)
    if grid is None and table is not None:
        grid = ((_grid(len(table) - 3)[0] + 1) // 2,) * 2
    elif grid is None:
        grid = _grid(state["pos_embed"].shape[1] - 1) if "pos_embed" in state else (_SIDE, _SIDE)
    arguments: dict[str, Any] = {
        "embed_dim": width,
        "depth": _depth(state),
        "num_heads": heads or (_heads(width) if table is None else table.shape[1]),
        "mlp_ratio": _ratio(hidden, width),
        "qkv_bias": "blocks.0.attn.q_bias" in state,
        "init_values": 0.1 if "blocks.0.gamma_1" in state else 0.0,
        "use_abs_pos_emb": "pos_embed" in state,
        "use_rel_pos_bias": "blocks.0.attn.relative_position_bias_table" in state,
        "use_shared_rel_pos_bias": shared,
    }
    size = [side * pixels for side, pixels in zip(grid, patch, strict=True)]
    large = width > 768
    own = {"name": "beit_large_patch16_224" if large else "beit_base_patch16_224", "patch_size": patch, "channels": channels}
    return {**own, "image_size": size, "arguments": arguments}


def clip_section_of(state: State, *, heads: int | None = None, grid: Grid | None = None) -> dict[str, Any]:
    """As :func:`section_of` for CLIP's ViT, which normalises before the blocks too; the name says its activation."""
    values = section_of(state, heads=heads or _heads(state["patch_embed.proj.weight"].shape[0]), grid=grid)
    width, hidden = state["norm.weight"].shape[0], state["blocks.0.mlp.fc1.weight"].shape[0]
    sizes = {"embed_dim": width, "depth": _depth(state), "mlp_ratio": _ratio(hidden, width)}
    return values | {"name": "vit_base_patch16_clip_224", "arguments": {"num_heads": values["arguments"]["num_heads"]} | sizes}


def _depth(state: State) -> int:
    return 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))


def _heads(width: int) -> int:
    if width % 64:
        raise CheckpointError(f"a width of {width} does not say how many heads there are; say it with --heads")
    return width // 64


def _ratio(hidden: int, width: int) -> float:
    """A number of which timm's ``int(width * ratio)`` makes ``hidden``, whatever the rounding."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _grid(num: int) -> Grid:
    side = round(num**0.5)
    if side * side != num:
        raise CheckpointError(f"{num} positions are no square grid; only those of square images are read")
    return side, side
