"""Whether weights fit a model, and what to say in one line when they do not."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from vitssl.errors import CheckpointError, first_of


def require_fit(state: Mapping[str, Tensor], own: Mapping[str, Tensor], *, model: str, advice: str = "") -> None:
    """Nothing, if both have the same names and shapes. Else raises CheckpointError with a table of what differs.

    ``advice`` is added where the only difference is the shape of ``pos_embed``.
    """
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    other = [key for key in own if key in state and state[key].shape != own[key].shape]
    if not (missing or unexpected or other):
        return
    shapes = [f"{key} {by(state[key])} instead of {by(own[key])}" for key in other]
    found = {"missing": missing, "unexpected": unexpected, "of other shape": shapes}
    table = "; ".join(f"{len(keys)} {title} ({first_of(keys, 4)})" for title, keys in found.items() if keys)
    only_positions = other == ["pos_embed"] and not (missing or unexpected)
    raise CheckpointError(f"these weights do not fit {model}: {table}" + (f"; {advice}" if only_positions and advice else ""))


def digest_of(state: Mapping[str, Tensor]) -> str:
    """A hash of tensors and their names, whatever file they came from."""
    digest = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(state.items()):
        numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(name.encode() + b"\0" + numbers.numpy().tobytes())
    return digest.hexdigest()


def by(tensor: Tensor) -> str:
    """A shape as people write it: ``1x197x768``."""
    return "x".join(str(n) for n in tensor.shape) or "scalar"
