"""A ViT's tensors under timm's names and under transformers' names: one table, read in both directions.

A tensor of ours may be several of theirs laid end to end (query, key, value), so going out cuts and coming in joins; no number
changes. Only where registers meet positions are two tensors added: timm may have positions for registers, DINOv2 has one for
the class token alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitssl.errors import CheckpointError

State = dict[str, Tensor]
_OUTSIDE = {  # outside the blocks
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_ATTENTION = {
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.proj": ("attention.o_proj",),
}
_MLP = {"mlp.fc1": ("mlp.fc1",), "mlp.fc2": ("mlp.fc2",)}
_GATED = {"mlp.fc1": ("mlp.gate_proj", "mlp.up_proj"), "mlp.fc2": ("mlp.down_proj",)}
_NORMS = {"norm1": ("norm1",), "norm2": ("norm2",)}
BLOCK = {**_ATTENTION, **_MLP, "norm1": ("layernorm_before",), "norm2": ("layernorm_after",)}


@dataclass(frozen=True)
class Layout:
    """``layers``: what the list of blocks is called; ``block``: a block's part in timm -> its parts there.

    ``tensors``: likewise for what is no part but a tensor of its own in a block; ``outside``: tensors outside the blocks;
    ``gated``: parts that are called otherwise where the MLP is gated, none where there is no such part.
    """

    layers: str
    block: Mapping[str, tuple[str, ...]]
    tensors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    outside: Mapping[str, str] = field(default_factory=lambda: _OUTSIDE)
    gated: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _GATED)

    def names(self, name: str, *, gated: bool) -> tuple[str, ...]:
        """Their names of one tensor of ours. Raises CheckpointError for a tensor that has no place there."""
        if name in self.outside:
            return (self.outside[name],)
        _, _, inside = name.partition("blocks.")
        index, _, rest = inside.partition(".")
        if rest in self.tensors:
            return tuple(f"{self.layers}.{index}.{each}" for each in self.tensors[rest])
        part, _, last = rest.rpartition(".")
        block = self._parts(gated)
        if part not in block:
            raise CheckpointError(f"transformers' networks have no place for {name}; export --to timm or --to onnx")
        return tuple(f"{self.layers}.{index}.{each}.{'lambda1' if last == 'gamma' else last}" for each in block[part])

    def inside(self, *, gated: bool) -> list[str]:
        """Our names of what a block may have, without the block's."""
        return [f"{part}.{last}" for part in self._parts(gated) for last in _lasts(part)] + list(self.tensors)

    def _parts(self, gated: bool) -> dict[str, tuple[str, ...]]:
        parts = {**self.block, **self.gated} if gated else self.block
        return {part: theirs for part, theirs in parts.items() if theirs}


_BIASES = {"attn.q_bias": ("attention.q_proj.bias",), "attn.v_bias": ("attention.v_proj.bias",)}
_TABLE = "relative_position_bias_table"
PLAIN = Layout("layers", BLOCK)
DINOV2 = Layout("encoder.layer", {**_ATTENTION, **_MLP, **_NORMS, "ls1": ("layer_scale1",), "ls2": ("layer_scale2",)})
DINOV3 = Layout(
    "model.layer",
    {**_ATTENTION, **_NORMS, "mlp.fc1": ("mlp.up_proj",), "mlp.fc2": ("mlp.down_proj",)},
    tensors={**_BIASES, "gamma_1": ("layer_scale1.lambda1",), "gamma_2": ("layer_scale2.lambda1",)},
    outside={
        "cls_token": "embeddings.cls_token",
        "reg_token": "embeddings.register_tokens",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.bias",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
    },
    gated={"mlp.fc1": (), "mlp.fc1_g": ("mlp.gate_proj",), "mlp.fc1_x": ("mlp.up_proj",)},
)
BEIT = Layout(
    "layers",
    BLOCK,
    tensors={
        **_BIASES,
        "gamma_1": ("lambda_1",),
        "gamma_2": ("lambda_2",),
        f"attn.{_TABLE}": (f"relative_position_bias.{_TABLE}",),
    },
    outside=_OUTSIDE | {f"rel_pos_bias.{_TABLE}": f"shared_position_bias.{_TABLE}"},
)
DATA2VEC = Layout(
    "encoder.layer",
    {
        "attn.qkv": tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
        "attn.proj": ("attention.output.dense",),
        "mlp.fc1": ("intermediate.dense",),
        "mlp.fc2": ("output.dense",),
        "norm1": ("layernorm_before",),
        "norm2": ("layernorm_after",),
    },
    tensors={
        "attn.q_bias": ("attention.attention.query.bias",),
        "attn.v_bias": ("attention.attention.value.bias",),
        "gamma_1": ("lambda_1",),
        "gamma_2": ("lambda_2",),
        f"attn.{_TABLE}": (f"attention.attention.relative_position_bias.{_TABLE}",),
    },
    outside=_OUTSIDE | {f"rel_pos_bias.{_TABLE}": f"encoder.relative_position_bias.{_TABLE}"},
)


def foreign(state: Mapping[str, Tensor], layout: Layout) -> State:
    """A timm state under their names. Raises CheckpointError where a tensor has no place."""
    gated = is_gated(state)
    found: State = {}
    for name, tensor in state.items():
        names = layout.names(name, gated=gated)
        found |= {each: part.clone() for each, part in zip(names, tensor.chunk(len(names)), strict=True)}
    return found


def own(state: Mapping[str, Tensor], layout: Layout) -> State:
    """Their state under timm's names. Raises CheckpointError for tensors that nothing in the table is called."""
    depth = len(
        {name.removeprefix(f"{layout.layers}.").split(".")[0] for name in state if name.startswith(f"{layout.layers}.")}
    )
    gated = any(".gate_proj." in name for name in state)
    inside = [f"blocks.{index}.{rest}" for index in range(depth) for rest in layout.inside(gated=gated)]
    found: State = {}
    left = set(state)
    for name in (*layout.outside, *inside):
        names = layout.names(name, gated=gated)
        if left.issuperset(names):
            found[name] = torch.cat([state[each] for each in names])
            left.difference_update(names)
    if left:
        raise CheckpointError(f"{len(left)} tensors have no name in timm: {', '.join(sorted(left)[:4])}")
    return found


def is_gated(state: Mapping[str, Tensor]) -> bool:
    """Whether the MLPs of a timm state have a gate: two first layers, or one that is twice as wide as what comes of it."""
    if "blocks.0.mlp.fc1_g.weight" in state:
        return True
    return state["blocks.0.mlp.fc1.weight"].shape[0] != state["blocks.0.mlp.fc2.weight"].shape[1]


def merge_positions(state: State) -> State:
    """DINOv2's state with registers as timm has it: the class token's position is added to it, registers have none."""
    if "reg_token" not in state or "pos_embed" not in state:
        return state
    positions = state["pos_embed"]
    return state | {"cls_token": state["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}


def split_positions(state: State, *, num_patches: int) -> State:
    """timm's state as DINOv2 has it: a position for the class token and none for registers, whatever timm's model has.

    Without positions for prefix tokens a zero stands there, so coming back gives the same bits.
    """
    if "reg_token" not in state or "pos_embed" not in state:
        return state
    tokens, positions = torch.cat([state["cls_token"], state["reg_token"]], dim=1), state["pos_embed"]
    num = tokens.shape[1]
    if positions.shape[1] > num_patches:
        tokens, positions = tokens + positions[:, :num], positions[:, num:]
    zero = torch.zeros_like(positions[:, :1])
    return state | {"cls_token": tokens[:, :1], "reg_token": tokens[:, 1:], "pos_embed": torch.cat([zero, positions], dim=1)}


def _lasts(part: str) -> tuple[str, ...]:
    return ("gamma",) if part.startswith("ls") else ("weight", "bias")
