"""Whether weights fit a model, and what to say in one line when they do not."""

from collections.abc import Mapping

from torch import Tensor

from vitssl.errors import CheckpointError


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
    table = "; ".join(f"{len(keys)} {title} ({_first(keys)})" for title, keys in found.items() if keys)
    only_positions = other == ["pos_embed"] and not (missing or unexpected)
    raise CheckpointError(f"these weights do not fit {model}: {table}" + (f"; {advice}" if only_positions and advice else ""))


def by(tensor: Tensor) -> str:
    """A shape as people write it: ``1x197x768``."""
    return "x".join(str(n) for n in tensor.shape) or "scalar"


def _first(keys: list[str], num: int = 4) -> str:
    return ", ".join(keys[:num]) + (f", and {len(keys) - num} more" if len(keys) > num else "")
