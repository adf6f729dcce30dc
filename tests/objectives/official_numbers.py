"""What tests against official numbers share: a golden folder, and how near to it a number must be."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vitssl.models.encoder import Encoder


class Golden:
    """A folder of tests/golden: ``config`` and ``tables`` as plain values, tensors by name."""

    def __init__(self, name: str) -> None:
        folder = Path(__file__).parents[1] / "golden" / name
        self.config: dict[str, Any] = json.loads((folder / "meta.json").read_text())["config"]
        self.tables: dict[str, Any] = json.loads((folder / "tables.json").read_text())
        self.weights, self.inputs, self.outputs = (
            load_file(folder / f"{part}.safetensors") for part in ("weights", "inputs", "outputs")
        )

    def below(self, prefix: str) -> dict[str, Tensor]:
        """Outputs whose names begin so, by the rest of their names."""
        return {name.removeprefix(prefix): value for name, value in self.outputs.items() if name.startswith(prefix)}


def beit(config: dict[str, Any], *, bias: bool) -> Encoder:
    """The tiny BEiT that SimMIM's and data2vec's codes were run with, at fresh weights; ``bias``: positions of each block."""
    arguments = {"embed_dim": config["dim"], "depth": config["depth"], "num_heads": config["heads"]}
    arguments |= {"mlp_ratio": config["mlp_ratio"], "init_values": config["init_values"]}
    arguments |= {"use_rel_pos_bias": bias, "use_shared_rel_pos_bias": config["shared_rpb"]}
    sizes = {"image_size": config["img"], "patch_size": config["patch"]}
    return Encoder.create("beit_base_patch16_224", **sizes, class_token=None, registers=None, arguments=arguments)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal to ``tolerance`` relative to the largest entry."""
    atol = tolerance * max(expected.abs().max().item(), 1e-30)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=atol)
