"""Whether two networks compute the same: asked of every file that comes in or goes out, before anyone uses it.

Two torch networks are compared in float64, where rounding stays below 1e-12 and a sum of two weights, kept in float32, below
1e-7; so a wrong activation or another epsilon is seen, which float32 would hide.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vitssl.errors import CheckpointError

TOLERANCE = 1e-7  # in float64, relative to the largest value


def trial_images(
    facts: Mapping[str, Any], given: Tensor | None = None, *, num: int = 2, size: tuple[int, int] | None = None
) -> Tensor:
    """[num, C, H, W] float64, as normalised images are: about zero mean and unit deviation, the same ones each time.

    ``given`` [N, C, H, W], real ones, stand behind these.
    """
    height, width = size or facts["image_size"]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num, len(facts["mean"]), height, width, generator=generator, dtype=torch.float64)
    return images if given is None else torch.cat([images, given.double()])


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors, relative to the largest value of the second. Infinite for other shapes."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def require_parity(found: Tensor, expected: Tensor, *, what: str, tolerance: float = TOLERANCE) -> float:
    """The difference, which is then within the tolerance. Raises CheckpointError otherwise, also where it is no number."""
    reached = difference(found, expected)
    if not reached <= tolerance:
        raise CheckpointError(
            f"{what}: its outputs differ from the original's by {reached:.1e} of their size, where {tolerance:.0e} is borne;"
            " nothing was written, and its weights are not to be trusted"
        )
    return reached


@contextmanager
def exactly(*models: nn.Module) -> Iterator[None]:
    """Evaluation in float64 without gradients; models come back in float32, which loses nothing."""
    for model in models:
        model.double().eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model in models:
            model.float()
