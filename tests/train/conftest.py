"""What the tests of the machine train: a small MAE, and a task of given parameters."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from vitssl.models.encoder import Encoder
from vitssl.objectives import create
from vitssl.objectives.mixture import Mixture
from vitssl.task import Rule, Task


class RuledTask(Task):
    """Parameters by name and shape, optimised as ``rules`` say."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], rules: list[Rule]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.rules = rules

    def param_rules(self) -> list[Rule]:
        return self.rules


@pytest.fixture(scope="session")
def ruled() -> type[RuledTask]:
    return RuledTask


@pytest.fixture(scope="session")
def small_mae() -> Callable[..., Mixture]:
    """A function of sizes that builds a MAE."""

    def build(*, image: int = 16, patch: int = 4, dim: int = 24, depth: int = 2, heads: int = 2, decoder=(16, 1, 2), **more):
        arguments = {"embed_dim": dim, "depth": depth, "num_heads": heads}
        encoder = Encoder.create(
            "vit_tiny_patch16_224", image_size=image, patch_size=patch, positions="sincos", arguments=arguments, **more
        )
        sizes = dict(zip(("dim", "depth", "heads"), decoder))
        objective = create("mae", {"decoder": sizes}, encoder.spec)
        return Mixture(encoder, {"mae": objective}, mean=(0.5,) * 3, std=(0.5,) * 3)

    return build
