"""Images of several sizes in one pass: the numbers and gradients of a pass for each, over the variants of timm's block."""

import pytest
import torch

from vitssl.errors import ConfigError
from vitssl.models.adapters.packing import Block, pack, unpack
from vitssl.models.encoder import Encoder

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 3}
PLAIN = {
    "default": {},
    "registers": {"registers": 2},
    "LayerScale, norms of queries and keys": {"arguments": {"init_values": 0.1, "qk_norm": True}},
    "SwiGLU": {"name": "vit_small_patch14_reg4_dinov2", "patch_size": 8},
    "gated, normed attention": {"arguments": {"scale_attn_norm": True, "scale_mlp_norm": True}},
    "stochastic depth at rest": {"drop_path": 0.5},
}
OTHERS = {
    "RoPE": {"name": "vit_small_patch16_dinov3", "image_size": 32, "registers": None, "class_token": None},
    "parallel blocks": {"name": "vit_small_patch16_18x2_224"},
}
SIZES = [(2, 32, 32), (3, 16, 16), (1, 8, 24)]


def encoder_of(settings: dict) -> Encoder:
    settings = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, **settings}
    torch.manual_seed(0)
    encoder = Encoder.create(**{**settings, "arguments": TINY | settings.get("arguments", {})}).double()
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return encoder.eval()


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(num, 3, *size, generator=generator, dtype=torch.float64) for num, *size in SIZES]


def values(encoder: Encoder, packing: bool, **doors) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    encoder.packing = packing
    encoder.zero_grad(set_to_none=True)
    tokens = encoder.together(batches(), **doors)
    sum(((each.prefix**2).sum() + (each.patches**3).sum()) for each in tokens).backward()
    gradients = {name: value.grad.clone() for name, value in encoder.named_parameters() if value.grad is not None}
    return [torch.cat([each.prefix, each.patches], dim=1) for each in tokens], gradients


@pytest.mark.parametrize("name", [*PLAIN, *OTHERS])
@pytest.mark.parametrize("door", ["none", "mask", "keep"])
def test_one_pass_gives_what_three_give(name: str, door: str) -> None:
    encoder = encoder_of((PLAIN | OTHERS)[name])
    assert encoder.vit.packs == (name in PLAIN)
    noise = torch.rand(SIZES[0][0], encoder.spec.num_patches, generator=torch.Generator().manual_seed(2))
    masked = {"mask": noise < 0.4, "mask_token": torch.ones(24, dtype=torch.float64)}
    doors = {"none": {}, "mask": masked, "keep": {"keep": noise.argsort(dim=1)[:, :5]}}[door]
    (apart, slopes), (packed, packed_slopes) = values(encoder, False, **doors), values(encoder, True, **doors)
    assert [x.shape for x in packed] == [x.shape for x in apart] and len(packed) == len(SIZES)
    for mine, theirs in zip(packed, apart, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    assert packed_slopes.keys() == slopes.keys()
    for key, slope in slopes.items():
        torch.testing.assert_close(packed_slopes[key], slope, rtol=1e-8, atol=1e-8, msg=key)


@pytest.mark.parametrize("how", ["checkpointing", "compiled"])
def test_packed_blocks_are_computed_again_and_compiled_as_others_are(how: str) -> None:
    plain, other = encoder_of({}), encoder_of({})
    expected, slopes = values(plain, False)
    if how == "checkpointing":
        other.checkpointing = True
        other.train()
    else:
        other.compile_blocks()
    found, found_slopes = values(other, True)
    for mine, theirs in zip([*found, *found_slopes.values()], [*expected, *slopes.values()], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


def test_stochastic_depth_drops_whole_sequences() -> None:
    encoder = encoder_of({"drop_path": 0.5}).train()
    block = encoder.vit.blocks[-1]
    assert isinstance(block, Block)
    x, packing = pack([torch.randn(40, 5, 24, dtype=torch.float64), torch.randn(40, 3, 24, dtype=torch.float64)])
    torch.manual_seed(0)
    kinds = []
    for before, after in zip(unpack(x, packing), unpack(block(x, packing=packing), packing), strict=True):
        moved = (after - before).abs().flatten(1)
        kinds += [(row > 0).all() or not (row > 0).any() for row in moved]
        still = (moved == 0).all(dim=1).sum()
        assert 2 <= still <= 22  # both branches dropped: one in four
    assert all(kinds)


def test_a_size_that_patches_do_not_divide_is_refused_anywhere() -> None:
    encoder = encoder_of({})
    encoder.packing = True
    with pytest.raises(ConfigError, match="image's size 16x12 is not divisible"):
        encoder.together([batches()[0], torch.zeros(1, 3, 16, 12, dtype=torch.float64)])


def test_names_of_parameters_stay_timms() -> None:
    assert encoder_of({}).state().keys() >= {"blocks.1.attn.qkv.weight", "blocks.0.mlp.fc1.bias", "norm.weight"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel of variable lengths is CUDA's")
def test_the_kernel_of_variable_lengths_agrees() -> None:
    encoder = encoder_of({}).float().cuda()
    views = [each.float().cuda() for each in batches()]
    found = {}
    for encoder.packing in (False, True):
        with torch.autocast("cuda", torch.bfloat16):
            found[encoder.packing] = encoder.together(views)
    for mine, theirs in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(mine.patches.float(), theirs.patches.float(), rtol=0.05, atol=0.05)
