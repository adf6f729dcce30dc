"""An encoder that takes over another's weights: the same answers where they can be, one line of what differs where not."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vitssl.errors import CheckpointError
from vitssl.models.adopt import adopt, require_like
from vitssl.models.encoder import Encoder
from vitssl.models.positions import resample, sincos_2d


def make(seed: int = 0, **changes: Any) -> Encoder:
    """A small encoder whose weights are all random, also those that begin at zero; fixed positions stay."""
    torch.manual_seed(seed)
    arguments = {"embed_dim": 24, "depth": 2, "num_heads": 2} | changes.pop("arguments", {})
    values = {"name": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 4, "registers": 0} | changes
    encoder = Encoder.create(**values, arguments=arguments)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder.double().eval()


def taken(encoder: Encoder, other: Encoder) -> list[str]:
    require_like(encoder, other, advice="mend it")
    return adopt(encoder, other)


IMAGES = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
REGISTERS = {"registers": 2, "arguments": {"no_embed_class": True}}
DINOV3 = {"name": "vit_small_patch16_dinov3", "registers": 4}
SAME = {  # (the new encoder, the old one, what is said)
    "equal": ({}, {}, []),
    "fixed positions": ({"positions": "sincos"}, {"positions": "sincos"}, []),
    "fixed positions, rows first": ({"positions": "sincos_moco_v3"}, {"positions": "sincos_moco_v3"}, []),
    "fixed positions become learned ones": ({}, {"positions": "sincos"}, []),
    "registers": ({"registers": 2}, {"registers": 2}, []),
    "registers without positions": (REGISTERS, REGISTERS, []),
    "positions of registers, which the new one has none for": (REGISTERS, {"registers": 2}, []),
    "registers without positions, which the new one has": ({"registers": 2}, REGISTERS, []),
    "no class token": ({"class_token": False}, {"class_token": False}, []),
    "drop path": ({"drop_path": 0.3}, {}, []),
    "rotations": (DINOV3, DINOV3, []),
    "relative positions": ({"name": "beit_base_patch16_224"}, {"name": "beit_base_patch16_224"}, []),
}


@pytest.mark.parametrize("case", SAME)
def test_the_same_network_says_the_same(case: str) -> None:
    ours, theirs, notes = SAME[case]
    encoder, other = make(1, **ours), make(2, **theirs)
    assert taken(encoder, other) == notes
    ours, theirs = encoder(IMAGES), other(IMAGES)
    torch.testing.assert_close(ours.patches, theirs.patches, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.prefix, theirs.prefix, rtol=1e-10, atol=1e-10)
    if encoder.vit.pos_embed is not None:
        assert encoder.vit.pos_embed.requires_grad != encoder.fixed


def test_other_images_patches_and_channels_are_told() -> None:
    other = make(2)
    encoder = make(1, image_size=(48, 32), patch_size=8, channels=6, pos_resample="mae")
    assert taken(encoder, other) == [
        "patches of 4x4 pixels -> 8x8 (FlexiViT)",
        "3 channels -> 6",
        "positions 4x4 -> 6x4 (mae's rule)",
    ]
    expected = resample(other.state()["pos_embed"], (4, 4), (6, 4), "mae", prefix=1)
    torch.testing.assert_close(encoder.state()["pos_embed"], expected)


def test_an_image_of_twice_the_size_is_answered_as_before() -> None:
    """Twice the pixels a patch and the same grid: patches that are stretched say what they said."""
    other, encoder = make(2), make(1, image_size=32, patch_size=8)
    taken(encoder, other)
    whole = torch.empty(2, 3, 32, 32, dtype=torch.float64)
    small = IMAGES.unfold(2, 4, 4).unfold(3, 4, 4)  # [B, C, rows, columns, 4, 4]
    for row in range(4):
        for column in range(4):
            each = F.interpolate(small[:, :, row, column], size=(8, 8), mode="bicubic", antialias=True)
            whole[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = each
    torch.testing.assert_close(encoder(whole).patches, other(IMAGES).patches, rtol=1e-8, atol=1e-8)


def test_fixed_positions_are_the_new_grids() -> None:
    encoder, other = make(1, image_size=32, positions="sincos"), make(2, positions="sincos")
    assert taken(encoder, other) == ["positions 4x4 -> 8x8 (the fixed table)"]
    torch.testing.assert_close(encoder.state()["pos_embed"][0, 1:].double(), sincos_2d(24, (8, 8)), rtol=0, atol=1e-6)
    assert not encoder.state()["pos_embed"][0, 0].any() and not encoder.vit.pos_embed.requires_grad


def test_tokens_that_are_missing_begin_fresh() -> None:
    encoder, other = make(1, registers=3), make(2, registers=1)
    before = encoder.state()["reg_token"].clone(), encoder.state()["pos_embed"].clone()
    assert taken(encoder, other) == ["fresh: register 2, register 3"]
    state, theirs = encoder.state(), other.state()
    assert torch.equal(state["reg_token"][:, :1], theirs["reg_token"])
    assert torch.equal(state["reg_token"][:, 1:], before[0][:, 1:])
    assert torch.equal(state["pos_embed"][:, :2], theirs["pos_embed"][:, :2])
    assert torch.equal(state["pos_embed"][:, 2:4], before[1][:, 2:4])
    assert torch.equal(state["pos_embed"][:, 4:], theirs["pos_embed"][:, 2:])
    assert taken(make(1), make(2, class_token=False)) == ["fresh: class token"]


REFUSED = {
    "width and heads": ({"arguments": {"embed_dim": 48, "num_heads": 4}}, r"width 48 instead of 24, heads 4 instead of 2; me"),
    "depth": ({"arguments": {"depth": 3}}, r"do not fit vit_tiny_patch16_224: depth 3 instead of 2; mend it"),
    "heads alone": ({"arguments": {"num_heads": 4}}, r": heads 4 instead of 2; mend it"),
    "the MLP": ({"arguments": {"mlp_ratio": 2}}, r"6 of other shape \(blocks.0.mlp.fc1.weight 48x24 instead of 96x24.*; mend"),
    "layer scale": ({"arguments": {"init_values": 0.1}}, r"blocks Block of .*LayerScale.* instead of Block of .*; mend it"),
    "activation": ({"arguments": {"act_layer": "relu"}}, r"blocks Block of .*ReLU.* instead of Block of .*GELU.*; mend it"),
    "no bias": ({"arguments": {"qkv_bias": False}}, r"2 missing \(blocks.0.attn.qkv.bias, .*mend it"),
    "a register": ({"registers": 1}, r"have a register 1 and the encoder has none \(1 such tokens\).*mend it"),
    "a class token": ({}, r"have a class token and the encoder has none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit(case: str) -> None:
    theirs, message = REFUSED[case]
    with torch.device("meta"):
        encoder = Encoder.create(
            "vit_tiny_patch16_224", image_size=16, patch_size=4, class_token=case != "a class token",
            arguments={"embed_dim": 24, "depth": 2, "num_heads": 2},
        )  # fmt: skip
    with pytest.raises(CheckpointError, match=message):
        require_like(encoder, make(2, **theirs), advice="mend it")


def test_rotations_that_differ_are_seen_though_shapes_are_equal() -> None:
    encoder, other = make(1, **DINOV3), make(2, **DINOV3, arguments={"rope_temperature": 50.0})
    with pytest.raises(
        CheckpointError, match=r"rotations \w+DinoV3 of temperature 50.0, .* instead of \w+ of temperature 100.0"
    ):
        require_like(encoder, other, advice="mend it")


def test_relative_positions_move_to_another_grid() -> None:
    other, encoder = (make(2, name="beit_base_patch16_224", image_size=size) for size in (16, 24))
    assert taken(encoder, other) == ["relative positions 4x4 -> 6x6 (timm's rule)"]
    with torch.device("meta"):
        settings = {"image_size": 24, "patch_size": 4, "arguments": {"embed_dim": 24, "depth": 2, "num_heads": 2}}
        outline = Encoder.create("beit_base_patch16_224", **settings)
    require_like(outline, other, advice="mend it")
    expected = Encoder.create("beit_base_patch16_224", **settings)
    expected.load_state(other.state(), resample=True, grid=(4, 4))
    for name, tensor in expected.state().items():
        torch.testing.assert_close(encoder.state()[name].float(), tensor, rtol=0, atol=1e-6)
    larger, rotary = make(1, **DINOV3 | {"image_size": 32}), make(2, **DINOV3)
    assert taken(larger, rotary) == []  # rotations are computed for any grid
    assert all(torch.equal(larger.state()[name], tensor) for name, tensor in rotary.state().items())


def test_learned_positions_do_not_become_fixed_ones() -> None:
    with pytest.raises(CheckpointError, match=r"not the fixed table.*take encoder.positions=learned.* \(4x4\)"):
        adopt(make(1, positions="sincos"), make(2))


FAMILIES = {
    "DINOv3": {"name": "vit_small_patch16_dinov3"},
    "registers, no class token": {"name": "vit_medium_patch16_rope_reg1_gap_256"},
    "learned rotations and absolute": {"name": "vit_small_patch16_rope_mixed_ape_224"},
    "BEiT": {"name": "beit_base_patch16_224"},
    "one table for all blocks": {
        "name": "beit_base_patch16_224",
        "arguments": {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "use_abs_pos_emb": True},
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family: str) -> None:
    """The same answers on the same images; on another grid what the encoder's own way of loading makes of them."""
    settings = {"registers": None, "class_token": None, "image_size": 16, "patch_size": 4} | FAMILIES[family]
    settings["arguments"] = {"embed_dim": 24, "depth": 2, "num_heads": 2} | settings.get("arguments", {})

    def one(seed: int, **changes: Any) -> Encoder:
        torch.manual_seed(seed)
        encoder = Encoder.create(**settings | changes)
        for parameter in encoder.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        return encoder.eval()

    encoder, other, large, expected = one(1), one(2), one(3, image_size=(24, 16)), one(4, image_size=(24, 16))
    images = IMAGES.float()
    assert taken(encoder, other) == []
    torch.testing.assert_close(encoder(images).patches, other(images).patches, rtol=1e-5, atol=1e-5)
    notes = taken(large, other)
    expected.load_state(other.state(), resample=True, grid=(4, 4))
    for name, tensor in expected.state().items():
        torch.testing.assert_close(large.state()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert ("relative positions 4x4 -> 6x4 (timm's rule)" in notes) == ("beit" in settings["name"])
    assert ("positions 4x4 -> 6x4 (timm's rule)" in notes) == ("pos_embed" in other.state())
    with pytest.raises(CheckpointError, match=r"these weights do not fit vit_tiny_patch16_224: .*; mend it"):
        require_like(make(0), other, advice="mend it")
