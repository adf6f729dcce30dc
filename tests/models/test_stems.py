"""Stems whose patches overlap: Tokens-to-Token against the official numbers, timm's hybrids against timm, and the doors."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from vitssl.errors import CheckpointError, ConfigError
from vitssl.models.adopt import adopt, require_like
from vitssl.models.encoder import Encoder
from vitssl.models.stems import TokensToToken

GOLDEN = Path(__file__).parents[1] / "golden/vit_variants"
NAME, HYBRID = "vit_tiny_patch16_224", "vit_tiny_r_s16_p8_224"
TINY = {"embed_dim": 16, "depth": 1, "num_heads": 2}


def official(part: str, prefix: str) -> dict[str, torch.Tensor]:
    found = load_file(GOLDEN / f"{part}.safetensors")
    return {name.removeprefix(prefix): tensor.double() for name, tensor in found.items() if name.startswith(prefix)}


def t2t(**settings) -> Encoder:
    torch.manual_seed(0)
    return Encoder.create(NAME, stem="t2t", **{"image_size": 32, "arguments": TINY} | settings)


def hybrid(**settings) -> Encoder:
    torch.manual_seed(0)
    return Encoder.create(HYBRID, **{"image_size": 64, "arguments": TINY, "class_token": None} | settings)


def test_tokens_to_token_is_the_official_network() -> None:
    """The whole model: its stem, one block whose norms have torch's epsilon, fixed positions, and a head on the class token."""
    weights, expected = official("weights", "t2t."), official("outputs", "t2t.")
    head = nn.Linear(16, 5).double()
    head.load_state_dict({name: weights.pop(f"head.{name}") for name in ("weight", "bias")})
    encoder = t2t(arguments=TINY | {"mlp_ratio": 2.0, "qkv_bias": False}).double()
    encoder.vit.patch_embed = TokensToToken((32, 32), channels=3, dim=16, width=6).double()
    for part in encoder.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = 1e-5
    encoder.load_state({name.replace("tokens_to_token.", "patch_embed."): tensor for name, tensor in weights.items()})
    images = load_file(GOLDEN / "inputs.safetensors")["t2t_img"].double().requires_grad_()
    first = encoder.vit.patch_embed.attention1(nn.functional.unfold(images, 7, stride=4, padding=2).transpose(1, 2))
    features = encoder(images).cls
    logits = head(features)
    found = {"stage1": first, "tokens": encoder.vit.patch_embed(images), "features": features, "logits": logits}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-10, atol=1e-12, msg=name)
    logits.square().sum().backward()
    torch.testing.assert_close(images.grad, expected["grad_image"], rtol=1e-9, atol=1e-12)
    gradients = official("outputs", "t2t_grad/tokens_to_token.")
    own = dict(encoder.vit.patch_embed.named_parameters())
    assert gradients.keys() == own.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name].grad, gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (16, 48)])
def test_tokens_to_token_at_any_size(size: tuple[int, int]) -> None:
    encoder = t2t(image_size=size)
    assert (encoder.spec.grid, encoder.spec.patch) == ((size[0] // 16, size[1] // 16), (16, 16))
    assert encoder(torch.randn(2, 3, *size)).patches.shape == (2, encoder.spec.num_patches, 16)
    assert encoder(torch.randn(2, 3, 64, 48)).patches.shape == (2, 12, 16)


@pytest.mark.parametrize("settings", [{}, {"image_size": (64, 96)}, {"registers": 2, "channels": 1}], ids=str)
def test_a_hybrid_is_timms(settings: dict) -> None:
    encoder = hybrid(**settings).eval()
    model = timm.create_model(encoder.architecture, **encoder.arguments).eval()
    model.load_state_dict(encoder.state(), strict=True)
    images = torch.randn(2, encoder.spec.channels, *encoder.spec.image_size)
    tokens = encoder(images)
    torch.testing.assert_close(torch.cat([tokens.prefix, tokens.patches], dim=1), model.forward_features(images))
    assert encoder.spec.patch == (32, 32) and tokens.patches.shape[1] == encoder.spec.num_patches
    assert encoder(torch.randn(1, encoder.spec.channels, 96, 128)).patches.shape[1] == 12


@pytest.mark.parametrize("make", [t2t, hybrid])
def test_neighbours_are_seen_so_masks_are_refused(make) -> None:
    """A pixel of one patch moves another's token before any attention between patches; of plain patches it does not."""
    encoder = make()
    size, patch = encoder.spec.image_size, encoder.spec.patch[0]
    images = torch.zeros(2, 3, *size)
    images[1, :, :patch, patch - 2 : patch] = 1.0  # at the border of the first patch
    before, after = encoder.vit.patch_embed(images)
    assert encoder.spec.overlaps and not torch.equal(before[1], after[1])
    plain = Encoder.create(NAME, image_size=size, arguments=TINY, patch_size=patch)
    before, after = plain.vit.patch_embed(images)
    assert not plain.spec.overlaps and torch.equal(before[1], after[1]) and not torch.equal(before[0], after[0])
    keep, mask = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, encoder.spec.num_patches, dtype=torch.bool)
    for door in ({"keep": keep}, {"mask": mask, "mask_token": torch.zeros(16)}):
        with pytest.raises(ConfigError, match="what is asked masks patches, and this encoder's stem has mixed the pixels"):
            encoder(images, **door)


def test_stems_are_carried_over_only_as_they_are() -> None:
    for make in (t2t, hybrid):
        ours, theirs = make().eval(), make(image_size=(64, 96)).eval()
        for parameter in theirs.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        require_like(ours, theirs, advice="mend it")
        (note,) = adopt(ours, theirs)
        assert note.startswith("positions 2x3 -> " if make is hybrid else "positions 4x6 -> ")
        images = torch.randn(1, 3, *ours.spec.image_size)
        torch.testing.assert_close(ours.vit.patch_embed(images), theirs.vit.patch_embed(images))
    plain = Encoder.create(NAME, image_size=32, arguments=TINY)
    for ours, theirs, words in [
        (t2t(), plain, "stem PatchEmbed instead of TokensToToken of 16x16 pixels and 3 channels"),
        (plain, hybrid(), "stem HybridEmbed of 32x32 pixels and 3 channels instead of PatchEmbed"),
        (t2t(channels=1), t2t(), "3 channels instead of TokensToToken of 16x16 pixels and 1 channels"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            require_like(ours, theirs, advice="mend it")


REFUSED = {
    "other patches": (NAME, {"stem": "t2t", "patch_size": 8}, r"encoder.stem=t2t makes a token of 16x16 pixels, .* one of 8x8"),
    "two stems": (HYBRID, {"stem": "t2t"}, r"one of 32x32 by its HybridEmbed"),
    "patches of a hybrid": (HYBRID, {"patch_size": 16}, r"encoder.patch_size=16: the stem of vit_tiny_r_s16_p8_224 decides it"),
    "batch norms": ("vit_small_resnet26d_224", {}, r"'vit_small_resnet26d_224' has BatchNorms in its stem"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_stems_cannot_be(case: str) -> None:
    name, settings, message = REFUSED[case]
    with torch.device("meta"), pytest.raises(ConfigError, match=message) as caught:
        Encoder.create(name, image_size=64, **{"class_token": None, "registers": None, "arguments": TINY} | settings)
    assert "\n" not in str(caught.value)
