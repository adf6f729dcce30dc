"""DINOv3's tensors (Simeoni et al. 2025) under timm's names, from the official code; what both ways in need of its biases.

Surprising: the official attention has a bias of keys that a mask holds at zero, and timm's Eva has none. And its files hold
the rotary periods rounded to bfloat16, which timm computes anew in float32, as transformers does: outputs differ by some 2e-4
of their size, which is told.
"""

import re

import torch
from torch import Tensor

from vitssl.errors import CheckpointError

State = dict[str, Tensor]
BASE = 100.0  # of the rotary periods, in every published network
_ROUNDING = 2**-8  # of bfloat16, relative
_NAMES = {
    r"^storage_tokens$": "reg_token",
    r"\.ls([12])\.gamma$": r".gamma_\1",
    r"\.mlp\.w1\.": ".mlp.fc1_g.",
    r"\.mlp\.w2\.": ".mlp.fc1_x.",
    r"\.mlp\.w3\.": ".mlp.fc2.",
}


def of_official(state: State) -> State:
    """timm's names and parts. Raises CheckpointError for rotations that timm's network would not compute."""
    far = _distance(state)
    if not far <= 2 * _ROUNDING:
        raise CheckpointError(
            f"its rotary periods are not those of base {BASE:g}, which timm's DINOv3 has (they differ by {far:.1%}); "
            "such a network cannot be read"
        )
    found: State = {}
    for name, tensor in state.items():
        if name.endswith((".periods", ".bias_mask")):
            continue
        if (mask := state.get(f"{name}_mask")) is not None:
            tensor = torch.where(mask.bool(), tensor, torch.zeros_like(tensor))
        for theirs, ours in _NAMES.items():
            name = re.sub(theirs, ours, name)
        found[name] = tensor
    return without_key_biases(found)


def rotations(state: State) -> dict[str, str]:
    """What is to be told of a file's rotary periods, where they are not exactly those of their base."""
    far = _distance(state)
    said = f"of base {BASE:g} in float32, from which the file's periods differ by {far:.1e}"
    return {"rotations": said} if far > 1e-6 else {}


def without_key_biases(state: State) -> State:
    """Biases of queries and values alone, where all those of keys are zero; else the state as it is."""
    joined = {name: tensor.chunk(3) for name, tensor in state.items() if name.endswith(".attn.qkv.bias")}
    if any(keys.any() for _, keys, _ in joined.values()):
        return state
    split = {name: tensor for name, tensor in state.items() if name not in joined}
    for name, (queries, _, values) in joined.items():
        part = name.removesuffix("qkv.bias")
        split |= {f"{part}q_bias": queries.clone(), f"{part}v_bias": values.clone()}
    return split


def _distance(state: State) -> float:
    """The largest relative difference of a file's periods from those of the base."""
    periods = state["rope_embed.periods"].double()
    expected = BASE ** (torch.arange(len(periods), dtype=torch.float64) / len(periods))
    return float(((periods - expected) / expected).abs().max())
