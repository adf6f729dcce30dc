"""The encoder against timm itself, over a table of variants; the two doors; the state; the errors."""

import copy

import pytest
import timm
import torch

from vitssl.errors import CheckpointError, ConfigError
from vitssl.models.encoder import Encoder, Tokens

TINY = {"embed_dim": 24, "depth": 3, "num_heads": 3}
NAME = "vit_tiny_patch16_224"
VARIANTS = {
    "default": {},
    "registers": {"registers": 2},
    "no class token": {"class_token": False},
    "registers without class token": {"class_token": False, "registers": 3},
    "fixed sin-cos": {"positions": "sincos", "weights_init": "mae"},
    "MoCo v3": {"positions": "sincos_moco_v3", "weights_init": "moco_v3", "freeze_patch_embed": True},
    "one channel": {"channels": 1},
    "four channels": {"channels": 4},
    "oblong image": {"image_size": (32, 48)},
    "oblong patch": {"patch_size": (8, 4)},
    "small patch": {"patch_size": 4},
    "patches only have positions": {"arguments": {"no_embed_class": True}, "registers": 1},
    "no positions": {"arguments": {"pos_embed": "none"}},
    "dynamic size": {"arguments": {"dynamic_img_size": True}},
    "qk norm and layer scale": {"arguments": {"qk_norm": True, "init_values": 0.1}},
    "norm before the blocks": {"arguments": {"pre_norm": True}},
    "DINOv2": {"name": "vit_small_patch14_dinov2", "image_size": 28, "registers": None, "patch_size": None},
    "DINOv2 with registers": {"name": "vit_small_patch14_reg4_dinov2", "image_size": 28, "registers": None, "patch_size": None},
    "parallel blocks": {"name": "vit_small_patch16_18x2_224"},
    "CLIP": {"name": "vit_base_patch16_clip_224"},
    "SigLIP": {"name": "vit_base_patch16_siglip_224", "class_token": None},
}


def tiny(name: str = NAME, *, arguments: dict | None = None, **settings) -> Encoder:
    settings = {"image_size": 32, "patch_size": 8} | settings
    torch.manual_seed(0)
    encoder = Encoder.create(name, arguments=TINY | (arguments or {}), **settings)
    for parameter in encoder.parameters():  # no bias at zero, no scale at one
        parameter.data += 0.02 * torch.randn_like(parameter)
    return encoder.eval()


def timm_twin(encoder: Encoder, **overrides) -> torch.nn.Module:
    model = timm.create_model(encoder.architecture, **(encoder.arguments | overrides))
    model.load_state_dict(encoder.state(), strict=True)
    return model.eval()


def pictures(encoder: Encoder, size: tuple[int, int] | None = None, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, encoder.spec.channels, *(size or encoder.spec.image_size), generator=generator)


def joined(tokens: Tokens) -> torch.Tensor:
    return torch.cat([tokens.prefix, tokens.patches], dim=1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_timm(variant: str, dtype: torch.dtype, tolerance: float):
    encoder = tiny(**VARIANTS[variant]).to(dtype)
    model, images = timm_twin(encoder).to(dtype), pictures(encoder).to(dtype)
    with torch.no_grad():
        tokens, expected = encoder(images), model.forward_features(images)
    torch.testing.assert_close(joined(tokens), expected, rtol=0, atol=tolerance * expected.abs().max().item())
    assert tokens.prefix.shape[1] == encoder.spec.prefix
    assert tokens.patches.shape[1] == encoder.spec.num_patches
    assert (tokens.cls is not None) == encoder.spec.class_token == model.has_class_token


@pytest.mark.parametrize("size", [(48, 48), (16, 40), (32, 64)])
@pytest.mark.parametrize("settings", [{}, {"registers": 2, "arguments": {"no_embed_class": True}}, {"class_token": False}])
def test_another_image_size_equals_timm(size: tuple[int, int], settings: dict):
    encoder = tiny(**settings)
    model, images = timm_twin(encoder, dynamic_img_size=True), pictures(encoder, size)
    with torch.no_grad():
        tokens, expected = encoder(images), model.forward_features(images)
    torch.testing.assert_close(joined(tokens), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_state_fits_timm_over_the_registry():
    """Every plain VisionTransformer in timm: names and shapes, on the meta device; the others are refused in one line."""
    refused = []
    for name in timm.list_models(module="vision_transformer"):
        with torch.device("meta"):
            try:
                encoder = Encoder.create(name, image_size=224, registers=None, class_token=None, arguments={"depth": 2})
            except ConfigError as error:
                assert "\n" not in str(error)
                refused.append(name)
                continue
            model = timm.create_model(name, **encoder.arguments)
        own = {key: tuple(value.shape) for key, value in encoder.state().items()}
        assert own == {key: tuple(value.shape) for key, value in model.state_dict().items()}, name
    assert refused == []


def test_kept_tokens_are_those_of_a_shorter_sequence():
    """Oracle: timm's own pieces on gathered embeddings, in the order asked for."""
    encoder = tiny(registers=1)
    model, images = timm_twin(encoder), pictures(encoder)
    keep = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i))[:5] for i in range(2)])
    with torch.no_grad():
        whole = model._pos_embed(model.patch_embed(images))
        rows = [torch.cat([whole[b, :2], whole[b, 2:][keep[b]]]) for b in range(2)]
        expected = model.norm(model.blocks(torch.stack(rows)))
        torch.testing.assert_close(joined(encoder(images, keep=keep)), expected, rtol=0, atol=1e-5)


def test_keeping_all_patches_changes_nothing():
    encoder = tiny()
    images = pictures(encoder)
    everything = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(encoder(images, keep=everything).patches, encoder(images).patches)


def test_masked_patches_are_replaced_before_positions():
    encoder, token = tiny(), torch.randn(24)
    images = pictures(encoder)
    mask = torch.rand(2, 16, generator=torch.Generator().manual_seed(2)) < 0.5
    model = timm_twin(encoder)
    with torch.no_grad():
        patches = model.patch_embed(images)
        for b, n in mask.nonzero().tolist():
            patches[b, n] = token
        expected = model.norm(model.blocks(model._pos_embed(patches)))
        torch.testing.assert_close(joined(encoder(images, mask=mask, mask_token=token)), expected, rtol=0, atol=1e-5)


def test_last_blocks_stand_before_the_norm():
    encoder = tiny()
    images, outputs = pictures(encoder), []
    given = []
    encoder.vit.blocks[0].register_forward_pre_hook(lambda module, args: given.append(args[0]))
    for block in encoder.vit.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    every = encoder(images, last_blocks=4).blocks
    assert len(every) == 4 and all(torch.equal(joined(own), x) for own, x in zip(every, given + outputs))
    outputs.clear()
    tokens = encoder(images, last_blocks=2)
    assert len(tokens.blocks) == 2
    torch.testing.assert_close(joined(tokens.blocks[0]), outputs[1])
    torch.testing.assert_close(joined(encoder.norm(tokens.blocks[-1])), joined(tokens))
    torch.testing.assert_close(encoder.norm(outputs[2]), joined(tokens))


def test_checkpointing_changes_no_number():
    encoder = tiny()
    images = pictures(encoder)
    gradients = []
    for switch in (False, True):
        encoder.checkpointing = switch
        encoder.zero_grad()
        encoder(images).patches.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in encoder.parameters()])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


def test_fixed_positions_are_frozen_and_zero_for_prefix_tokens():
    encoder = Encoder.create(NAME, image_size=32, patch_size=8, positions="sincos", registers=1, arguments=TINY)
    assert not encoder.vit.pos_embed.requires_grad
    assert encoder.vit.pos_embed[:, :2].abs().max() == 0
    assert encoder.vit.pos_embed[:, 2:].abs().max() == 1


def test_drop_path_is_not_part_of_the_export():
    encoder = Encoder.create(NAME, image_size=32, drop_path=0.2, arguments=TINY)
    assert [round(block.drop_path1.drop_prob, 2) for block in list(encoder.vit.blocks)[1:]] == [0.1, 0.2]
    assert "drop_path_rate" not in encoder.arguments


def test_load_state_and_copies():
    source, target = tiny(), Encoder.create(NAME, image_size=32, patch_size=8, arguments=TINY).eval()
    target.load_state(source.state())
    images = pictures(source)
    torch.testing.assert_close(copy.deepcopy(target)(images).patches, source(images).patches, rtol=0, atol=0)


def test_load_state_resamples_positions_only_when_asked():
    source, target = tiny(), Encoder.create(NAME, image_size=48, patch_size=8, arguments=TINY).eval()
    with pytest.raises(CheckpointError, match=r"1 of other shape \(pos_embed 1x17x24 instead of 1x37x24\); resample=True"):
        target.load_state(source.state())
    target.load_state(source.state(), resample=True)
    images = pictures(source, (48, 48))
    torch.testing.assert_close(target(images).patches, source(images).patches)


def test_load_state_of_an_oblong_grid_needs_the_grid():
    source, target = tiny(image_size=(32, 48)), tiny()
    with pytest.raises(CheckpointError, match="no 5x5 grid; say which grid"):
        target.load_state(source.state(), resample=True)
    target.load_state(source.state(), resample=True, grid=(4, 6))


def test_load_state_names_what_does_not_fit():
    encoder = tiny()
    state = encoder.state()
    del state["cls_token"]
    state |= {"head.weight": torch.zeros(5, 24), "norm.weight": torch.zeros(7)}
    with pytest.raises(CheckpointError) as caught:
        encoder.load_state(state)
    assert str(caught.value) == (
        "these weights do not fit vit_tiny_patch16_224: 1 missing (cls_token); 1 unexpected (head.weight); "
        "1 of other shape (norm.weight 7 instead of 24)"
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"name": "vit_bse_patch16_224"}, "no such model; the nearest supported: vit_base_patch16_224"),
        ({"name": "resnet50"}, "is a ResNet with"),
        ({"name": "deit_base_distilled_patch16_224"}, "is a VisionTransformerDistilled with PatchEmbed; only a plain"),
        ({"image_size": 30}, "encoder.image_size 30x30 is not divisible by patches of 8x8; nearest: 32x32"),
        ({"arguments": {"depht": 3}}, "timm cannot build it with"),
        ({"arguments": {"in_chans": 3}}, "encoder.arguments.in_chans=3 .*set encoder.channels"),
        ({"arguments": {"global_pool": "avg"}}, "the encoder decides it itself"),
        ({"arguments": {"pos_embed": "none"}, "positions": "sincos"}, "has no absolute positions"),
        ({"arguments": {"embed_dim": 30}, "positions": "sincos"}, "divisible by 4, not 30"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(settings: dict, message: str):
    settings = {"name": NAME, "image_size": 32, "patch_size": 8} | settings
    arguments = TINY | settings.pop("arguments", {})
    with pytest.raises(ConfigError, match=message) as caught:
        Encoder.create(settings.pop("name"), arguments=arguments, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "doors, message",
    [
        ({"keep": torch.zeros(2, 3, dtype=torch.int64), "mask": torch.zeros(2, 16, dtype=torch.bool)}, "one of the two"),
        ({"mask": torch.zeros(2, 16, dtype=torch.bool)}, "belong together"),
        ({"mask_token": torch.zeros(24)}, "belong together"),
        ({"keep": torch.zeros(1, 3, dtype=torch.int64)}, r"keep must be \[2, K\]"),
        ({"mask": torch.zeros(2, 9, dtype=torch.bool), "mask_token": torch.zeros(24)}, r"mask must be \[2, 16\]"),
        ({"last_blocks": 5}, "has 3 blocks"),
    ],
)
def test_doors_refuse_what_makes_no_sense(doors: dict, message: str):
    encoder = tiny()
    with pytest.raises(ValueError, match=message):
        encoder(pictures(encoder), **doors)


def test_an_image_that_patches_do_not_divide_is_refused():
    encoder = tiny()
    with pytest.raises(ConfigError, match="40x42 is not divisible by patches of 8x8; nearest: 40x40"):
        encoder(pictures(encoder, (40, 42)))
