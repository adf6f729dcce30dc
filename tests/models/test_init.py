"""First weights: the official codes' deviations, bounds and zeros."""

import pytest

from vitssl.models.encoder import Encoder

NAME = "vit_tiny_patch16_224"


def test_mae_initialisation():
    arguments = {"embed_dim": 48, "depth": 3, "num_heads": 3}
    encoder = Encoder.create(NAME, image_size=32, patch_size=8, weights_init="mae", arguments=arguments)
    qkv, stem = encoder.vit.blocks[0].attn.qkv, encoder.vit.patch_embed.proj
    for weight, fans in ((qkv.weight, 48 + 144), (stem.weight, 3 * 64 + 48)):
        bound = (6 / fans) ** 0.5
        assert 0.97 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert qkv.bias.abs().max() == 0
    assert 0.01 < encoder.vit.cls_token.std() < 0.03


TORCH = (3 * 64 * 3) ** -0.5  # its own convolutions: uniform within 1 / sqrt(inputs)


@pytest.mark.parametrize(
    ("whose", "tokens", "stem", "qkv", "proj"),
    [
        ("timm", 1e-6, TORCH, 0.02, 0.02),
        ("dino", 0.02, TORCH, 0.02, 0.02),
        ("dinov2", 1e-6, TORCH, 0.02, 0.02),
        ("msn", 0.02, (2 / (3 * 64)) ** 0.5, 0.02, 0.02),
        ("beit", 0.0108, 0.0108, 0.0108, 0.0108 / 4**0.5),  # N(0, 0.02) cut at one deviation
        ("jepa", 1e-6, 0.02, 0.02, 0.02),
    ],
)
def test_initialisations_that_are_nearly_timms(whose, tokens, stem, qkv, proj):
    options = {"image_size": 32, "patch_size": 8, "registers": 2, "arguments": {"embed_dim": 192, "depth": 2, "num_heads": 3}}
    state = Encoder.create(NAME, weights_init=whose, **options).state()
    expected = {"cls_token": tokens, "patch_embed.proj.weight": stem, "blocks.1.attn.qkv.weight": qkv}
    expected |= {"blocks.1.attn.proj.weight": proj, "blocks.1.mlp.fc2.weight": proj}
    assert {name: state[name].std().item() for name in expected} == pytest.approx(expected, rel=0.15)
    assert (state["patch_embed.proj.bias"].abs().max() == 0) == (whose in ("msn", "beit", "jepa"))
    assert (state["pos_embed"][:, 1:3].abs().max() == 0) == (whose == "dinov2")


@pytest.mark.parametrize(("whose", "deviation", "bias"), [("timm", 1e-6, 1.0), ("dinov2", 0.02, 0.0)])
def test_gates_begin_as_other_layers_in_dinov2(whose: str, deviation: float, bias: float):
    arguments = {"embed_dim": 48, "depth": 1, "num_heads": 2}
    gates = Encoder.create("vit_giant_patch14_dinov2", image_size=28, weights_init=whose, arguments=arguments).state()
    weight = gates["blocks.0.mlp.fc1.weight"]
    assert weight[len(weight) // 2 :].std().item() == pytest.approx(deviation, rel=0.1)
    assert gates["blocks.0.mlp.fc1.bias"][len(weight) // 2 :].unique().tolist() == [bias]


def test_beits_blocks_add_less_the_deeper_they_are():
    arguments = {"embed_dim": 96, "depth": 3, "num_heads": 3}
    state = Encoder.create("beit_base_patch16_224", image_size=32, weights_init="beit", arguments=arguments).state()
    for number in range(3):
        for name in ("attn.proj", "mlp.fc2"):
            weight = state[f"blocks.{number}.{name}.weight"]
            assert weight.std().item() == pytest.approx(0.0108 / (2 * (number + 1)) ** 0.5, rel=0.05)
            assert weight.abs().max().item() <= 0.02 / (2 * (number + 1)) ** 0.5 + 1e-7
