"""MoCo v3's ViT: positions, first weights and what does not train, against the official numbers."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vitssl.models.encoder import Encoder

GOLDEN = Path(__file__).parents[1] / "golden/moco_v3"
SETTINGS = json.loads((GOLDEN / "meta.json").read_text())["config"]
TABLES = json.loads((GOLDEN / "tables.json").read_text())
NAME = "vit_tiny_patch16_224"
MOCO = {"positions": "sincos_moco_v3", "weights_init": "moco_v3", "freeze_patch_embed": True}


def vit(**settings) -> Encoder:
    torch.manual_seed(0)
    arguments = {"embed_dim": SETTINGS["dim"], "depth": SETTINGS["depth"], "num_heads": SETTINGS["heads"], "mlp_ratio": 2.0}
    sizes = {"image_size": SETTINGS["img"], "patch_size": SETTINGS["patch"]}
    return Encoder.create(NAME, **sizes, **settings, arguments=arguments)


def test_positions_are_the_official_table() -> None:
    """Computed in float32 there; MAE's table has the halves the other way round."""
    official = load_file(GOLDEN / "outputs.safetensors")["sincos_pos_embed"].float()
    torch.testing.assert_close(vit(**MOCO).vit.pos_embed.data, official, rtol=0, atol=1e-6)
    assert (vit(positions="sincos").vit.pos_embed - official).abs().max() > 0.5


def test_what_does_not_train() -> None:
    own = "base_encoder."
    official = {name.removeprefix(own): trains for name, trains in TABLES["requires_grad"].items() if name.startswith(own)}
    found = {name: parameter.requires_grad for name, parameter in vit(**MOCO).vit.named_parameters()}
    assert found == {name: trains for name, trains in official.items() if not name.startswith("head.")}
    assert not all(found.values()) and all(parameter.requires_grad for parameter in vit().parameters())


def test_first_weights_have_the_official_ranges() -> None:
    """Uniform ones come close to their bound, and have its deviation; a token of 16 numbers is only of that order."""
    for name, tensor in vit(**MOCO).vit.state_dict().items():
        largest, deviation = TABLES["init_abs_max_and_std"][name]
        found = (tensor.abs().max().item(), tensor.std().item())
        expected = pytest.approx((largest, deviation), rel=0.8 if name == "cls_token" else 0.05, abs=1e-7)
        assert found == expected, name


def test_queries_keys_and_values_are_three_matrices() -> None:
    (block,) = vit(**MOCO).vit.blocks
    bound = math.sqrt(6 / (SETTINGS["dim"] * 2))
    for matrix in block.attn.qkv.weight.chunk(3):
        assert 0.9 * bound < matrix.abs().max() <= bound


@pytest.mark.parametrize("name", [NAME, "vit_small_patch16_dinov3", "beit_base_patch16_224"])
def test_stochastic_depth_of_all_blocks_alike(name: str) -> None:
    arguments = {"embed_dim": 16, "depth": 3, "num_heads": 2}
    settings = {"image_size": 32, "registers": None, "class_token": None, "arguments": arguments, "drop_path": 0.3}
    for shape, rates in (("linear", [0.0, 0.15, 0.3]), ("uniform", [0.3] * 3)):
        encoder = Encoder.create(name, **settings, drop_path_shape=shape)
        for place in ("drop_path1", "drop_path2"):
            found = [getattr(getattr(block, place), "drop_prob", 0.0) for block in encoder.vit.blocks]
            assert found == pytest.approx(rates)
        plain = Encoder.create(name, **settings | {"drop_path": 0.0}, drop_path_shape=shape)
        assert plain.state().keys() == encoder.state().keys() and plain.arguments == encoder.arguments
