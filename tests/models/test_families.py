"""Eva (RoPE) and Beit (relative position bias) against timm itself: the two doors, other sizes, the state, what is refused."""

import copy

import pytest
import timm
import torch

from vitssl.errors import CheckpointError, ConfigError
from vitssl.models.encoder import Encoder, Tokens

TINY = {"embed_dim": 24, "depth": 3, "num_heads": 3}
EVAS = {
    "DINOv3": {"name": "vit_small_patch16_dinov3"},
    "DINOv3 with biases": {"name": "vit_small_patch16_dinov3_qkvb", "arguments": {"init_values": 0.1}},
    "DINOv3, gated": {"name": "vit_huge_plus_patch16_dinov3"},
    "EVA-02, absolute and rotary": {"name": "eva02_tiny_patch14_224"},
    "EVA-02, three projections": {"name": "eva02_base_patch14_224"},
    "EVA-02 CLIP, a norm in the attention": {"name": "eva02_base_patch16_clip_224"},
    "EVA, absolute alone": {"name": "eva_giant_patch14_224"},
    "EVA, norm after": {"name": "eva02_enormous_patch14_clip_224"},
    "registers, no class token": {"name": "vit_medium_patch16_rope_reg1_gap_256", "image_size": (32, 48)},
    "learned rotations": {"name": "vit_small_patch16_rope_mixed_224"},
    "learned rotations and absolute": {"name": "vit_small_patch16_rope_mixed_ape_224"},
    "perception encoder": {"name": "vit_pe_core_tiny_patch16_384"},
    "perception encoder without a norm": {"name": "vit_pe_spatial_tiny_patch16_512"},
    "sapiens2": {"name": "vit_base_patch16_sapiens2", "arguments": {"num_kv_heads": 1}},
    "no prefix, one channel": {"name": "vit_small_patch16_dinov3", "class_token": False, "registers": 0, "channels": 1},
}
BEITS = {
    "BEiT": {"name": "beit_base_patch16_224"},
    "BEiT, oblong": {"name": "beit_base_patch16_224", "image_size": (32, 48)},
    "one table for all blocks": {
        "name": "beit_base_patch16_224",
        "arguments": {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "use_abs_pos_emb": True},
    },
}
FAMILIES = EVAS | BEITS


def tiny(name: str, *, arguments: dict | None = None, **settings) -> Encoder:
    settings = {"image_size": 32, "patch_size": 8, "registers": None, "class_token": None} | settings
    torch.manual_seed(0)
    encoder = Encoder.create(name, arguments=TINY | (arguments or {}), **settings)
    for parameter in encoder.parameters():  # no bias at zero, no scale at one
        parameter.data += 0.1 * torch.randn_like(parameter)
    return encoder.eval()


def timm_twin(encoder: Encoder) -> torch.nn.Module:
    model = timm.create_model(encoder.architecture, **encoder.arguments)
    model.load_state_dict(encoder.state(), strict=True)
    return model.eval()


def pictures(encoder: Encoder, size: tuple[int, int] | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, encoder.spec.channels, *(size or encoder.spec.image_size), generator=generator)


def joined(tokens: Tokens) -> torch.Tensor:
    return torch.cat([tokens.prefix, tokens.patches], dim=1)


def choice(num: int, among: int) -> torch.Tensor:
    """[2, num]: for two images other patches in another order."""
    return torch.stack([torch.randperm(among, generator=torch.Generator().manual_seed(seed))[:num] for seed in (3, 4)])


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_timm(family: str):
    encoder = tiny(**FAMILIES[family])
    model, images = timm_twin(encoder), pictures(encoder)
    with torch.no_grad():
        tokens, expected = encoder(images), model.forward_features(images)
    assert torch.equal(joined(tokens), expected)
    assert tokens.prefix.shape[1] == encoder.spec.prefix == model.num_prefix_tokens
    assert (tokens.cls is not None) == (model.cls_token is not None) and encoder.spec.dim == model.embed_dim
    assert type(encoder.vit.norm) is type(model.norm)


@pytest.mark.parametrize("size", [(48, 48), (16, 40)])
@pytest.mark.parametrize("family", EVAS)
def test_another_image_size_equals_timm(family: str, size: tuple[int, int]):
    encoder = tiny(**EVAS[family])
    images = pictures(encoder, size)
    with torch.no_grad():
        torch.testing.assert_close(joined(encoder(images)), timm_twin(encoder).forward_features(images), rtol=0, atol=1e-6)


def slowly(model: torch.nn.Module, images: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """timm's own pieces on one image after the other, with the rows of embeddings and rotations picked by hand."""
    rows = []
    for image, kept in zip(images, keep):
        x, rope = model._pos_embed(model.patch_embed(image[None]))
        num = model.num_prefix_tokens
        x = torch.cat([x[:, :num], torch.stack([x[:, num + place] for place in kept], dim=1)], dim=1)
        x = model.norm_pre(x)
        for index, block in enumerate(model.blocks):
            own = rope[index] if model.rope_mixed else rope
            x = block(x, rope=own if own is None else torch.stack([own[..., place, :] for place in kept], dim=-2))
        rows.append(model.norm(x))
    return torch.cat(rows)


@pytest.mark.parametrize("family", EVAS)
def test_kept_patches_take_the_rotation_of_their_place(family: str):
    encoder = tiny(**EVAS[family])
    images = pictures(encoder, (32, 48))
    keep = choice(7, 24)
    with torch.no_grad():
        found, expected = joined(encoder(images, keep=keep)), slowly(timm_twin(encoder), images, keep)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        if encoder.vit.rope is not None:  # places matter: the same patches at other places are others
            elsewhere = joined(encoder(images.roll(8, dims=3), keep=keep))
            assert not torch.allclose(elsewhere, found, atol=1e-3)


@pytest.mark.parametrize("family", EVAS)
def test_all_patches_in_another_order_are_the_same_patches(family: str):
    encoder = tiny(**EVAS[family])
    images, order = pictures(encoder, (32, 48)), choice(24, 24)
    with torch.no_grad():
        whole, found = encoder(images), encoder(images, keep=order)
        expected = torch.stack([row[places] for row, places in zip(whole.patches, order)])
        torch.testing.assert_close(found.patches, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        torch.testing.assert_close(found.prefix, whole.prefix, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_patches_are_replaced_before_positions(family: str):
    """Oracle: a stem that paints the token itself."""
    encoder, token = tiny(**FAMILIES[family]), torch.randn(24)
    model, images = timm_twin(encoder), pictures(encoder)
    mask = torch.rand(2, encoder.spec.num_patches, generator=torch.Generator().manual_seed(2)) < 0.5

    def painted(module, args, patches):
        flat = patches.reshape(2, -1, 24).clone()
        for b, n in mask.nonzero().tolist():
            flat[b, n] = token
        return flat.reshape(patches.shape)

    model.patch_embed.register_forward_hook(painted)
    with torch.no_grad():
        expected = model.forward_features(images)
        torch.testing.assert_close(joined(encoder(images, mask=mask, mask_token=token)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_number_and_gradients_reach_everything(family: str):
    encoder = tiny(**FAMILIES[family])
    images, gradients = pictures(encoder), []
    doors = {"keep": choice(5, 16)} if family in EVAS else {}
    for switch in (False, True):
        encoder.checkpointing = switch
        encoder.zero_grad()
        tokens = encoder(images, last_blocks=2, **doors)
        (joined(tokens).square().sum() + joined(encoder.norm(tokens.blocks[0])).sin().sum()).backward()
        gradients.append({name: parameter.grad for name, parameter in encoder.named_parameters()})
    for name, plain in gradients[0].items():
        assert plain is not None and plain.abs().max() > 0, name
        torch.testing.assert_close(plain, gradients[1][name], rtol=0, atol=0)


def test_state_fits_timm_over_the_registry():
    """Every Eva and Beit in timm: names and shapes, on the meta device."""
    for name in timm.list_models(module="eva") + timm.list_models(module="beit"):
        more = {"num_kv_heads": 4} if "sapiens2" in name else {}
        with torch.device("meta"):
            settings = {"image_size": 224, "registers": None, "class_token": None, "arguments": {"depth": 2} | more}
            encoder = Encoder.create(name, **settings)
            model = timm.create_model(name, **encoder.arguments)
        own = {key: tuple(value.shape) for key, value in encoder.state().items()}
        assert own == {key: tuple(value.shape) for key, value in model.state_dict().items()}, name


@pytest.mark.parametrize("family", ["EVA-02, absolute and rotary", "DINOv3", *BEITS])
def test_weights_move_to_another_image_size(family: str):
    """As timm itself carries them over, when a network is given another input size."""
    source = tiny(**FAMILIES[family])
    target = tiny(**FAMILIES[family] | {"image_size": 48})
    target.load_state(source.state(), resample=True, grid=source.spec.grid)
    expected = timm_twin(source)
    expected.set_input_size((48, 48))
    assert expected.state_dict().keys() == target.state().keys()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(target.state()[name], tensor, rtol=0, atol=1e-6, msg=name)
    with torch.no_grad():
        images = pictures(target)
        torch.testing.assert_close(joined(target(images)), expected.forward_features(images), rtol=0, atol=1e-6)


def test_tables_of_another_grid_are_asked_after():
    source, target = tiny("beit_base_patch16_224", image_size=(32, 48)), tiny("beit_base_patch16_224")
    with pytest.raises(CheckpointError, match=r"3 of other shape \(blocks.0.attn.relative_position_bias_table 80x3 instead of"):
        target.load_state(source.state())
    with pytest.raises(CheckpointError, match="holds 77 relative positions, which are not those of a 5x5 grid; say which"):
        target.load_state(source.state(), resample=True)
    target.load_state(tiny("beit_base_patch16_224", image_size=48).state(), resample=True)  # a square says it itself


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("family", ["DINOv3", "perception encoder without a norm", "BEiT"])
def test_timm_makes_the_classifier_of_the_same_arguments(family: str, pooled: bool):
    encoder = tiny(**FAMILIES[family])
    norm = encoder.drop_norm() if pooled else torch.nn.Identity()
    pooled = not isinstance(norm, torch.nn.Identity)
    said = {"num_classes": 5, "global_pool": "avg", "fc_norm": pooled, "final_norm": True}
    model = timm.create_model(encoder.architecture, **encoder.arguments_with(said)).eval()
    head = {f"fc_norm.{key}": tensor for key, tensor in norm.state_dict().items()}
    model.load_state_dict(encoder.state() | head | {"head.weight": torch.eye(24)[:5], "head.bias": torch.zeros(5)}, strict=True)
    images = pictures(encoder)
    with torch.no_grad():
        expected = norm(encoder(images).pool("mean"))[:, :5]
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-5)


def test_coordinates_are_stretched_at_random_in_training_alone_and_from_the_global_generator():
    encoder = tiny(**EVAS["sapiens2"])
    images = pictures(encoder)

    def seen(model: Encoder, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return joined(model(images)).detach()

    assert torch.equal(seen(encoder, 1), seen(encoder, 2))
    encoder.train()
    assert torch.equal(seen(encoder, 1), seen(encoder, 1)) and not torch.equal(seen(encoder, 1), seen(encoder, 2))
    plain = tiny(**EVAS["DINOv3"]).train()
    assert torch.equal(seen(plain, 1), seen(plain, 2))


def test_copies_and_other_numbers_keep_what_is_no_parameter():
    encoder = tiny(**EVAS["DINOv3"])
    images = pictures(encoder)
    with torch.no_grad():
        expected = joined(encoder(images))
        assert torch.equal(joined(copy.deepcopy(encoder)(images)), expected)
        encoder.double()
        model = timm_twin(encoder).double()
        assert torch.equal(joined(encoder(images.double())), model.forward_features(images.double()))


def test_tables_of_rotations_are_kept_for_each_grid_and_serve_training_after_inference():
    encoder = tiny(**EVAS["DINOv3"]).train()
    with torch.inference_mode():
        joined(encoder(pictures(encoder)))
    for size in ((32, 32), (16, 40), (32, 32)):
        joined(encoder(pictures(encoder, size))).sum().backward()
    assert [grid for grid, *_ in encoder.vit._tables] == [(4, 4), (2, 5)]
    for step in range(100):
        encoder(pictures(encoder, (8, 8 * (step + 1))))
    assert len(encoder.vit._tables) <= 64


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"name": "beit_base_patch16_224", "registers": 4}, "encoder.registers=4: timm's Beit always has 0; leave it out"),
        ({"name": "beit_base_patch16_224", "class_token": False}, "encoder.class_token=False: timm's Beit always has True"),
        ({"name": "vit_small_patch16_dinov3", "arguments": {"num_reg_tokens": 2}}, "set encoder.registers"),
        ({"name": "vit_small_patch16_dinov3", "arguments": {"dynamic_img_size": False}}, "the encoder decides it itself"),
        ({"name": "vit_small_patch16_dinov3", "arguments": {"use_fc_norm": True}}, "the encoder decides it itself"),
        ({"name": "vit_small_patch16_dinov3", "arguments": {"rope_type": "spiral"}}, "timm cannot build it with .*spiral"),
        ({"name": "vit_small_patch16_dinov3", "positions": "sincos"}, "has no absolute positions; use learned"),
        ({"name": "vit_small_patch16_dinov4"}, "no such model; the nearest supported: vit_small_patch16_dinov3"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        tiny(**settings)
    assert "\n" not in str(caught.value)


def test_a_beit_drops_no_patches_and_has_one_size():
    encoder = tiny("beit_base_patch16_224")
    with pytest.raises(ConfigError, match=r"patches cannot be dropped from a Beit.*; take an objective") as caught:
        encoder(pictures(encoder), keep=choice(5, 16))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="an image of 48x32, but this Beit's relative positions are for 32x32 alone; set enc"):
        encoder(pictures(encoder, (48, 32)))
