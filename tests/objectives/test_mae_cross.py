"""CrossMAE's decoder against a loop over patches, heads and tokens; that patches are painted apart; and where it is refused."""

import math

import pytest
import torch
from contract import CLOCK, batch, build
from torch import Tensor

from pretrain.run import plain_mae
from vitssl.errors import ConfigError
from vitssl.models.encoder import Tokens
from vitssl.models.spec import EncoderSpec
from vitssl.objectives import create
from vitssl.objectives.base import Nets

SPEC = EncoderSpec(dim=16, depth=2, heads=2, patch=(4, 4), grid=(4, 4), prefix=1)
KEEP, PLACES = torch.tensor([[3, 9, 0], [8, 1, 15]]), torch.tensor([[5, 12, 7, 2], [4, 6, 0, 11]])
MIXED = pytest.mark.parametrize("mixing", [False, True])


def painter(*, mixing: bool = False, attention: str = "cross") -> tuple[torch.nn.Module, Tokens]:
    """A decoder of two blocks, none of its numbers at rest, and tokens of two images with all that blocks gave."""
    torch.manual_seed(0)
    sizes = {"dim": 12, "depth": 2, "heads": 3, "attention": attention, "mixing": mixing}
    decoder = create("mae", {"decoder": sizes}, SPEC).decoder.double()
    for parameter in decoder.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    last, *blocks = (Tokens(torch.randn(2, 1, 16).double(), torch.randn(2, 3, 16).double()) for _ in range(4))
    return decoder, Tokens(last.prefix, last.patches, blocks)


def one_patch(decoder: torch.nn.Module, tokens: Tokens, image: int, place: int) -> Tensor:
    """[out]: what is painted of it, by the definition of attention."""
    x = decoder.mask_token[0, 0] + decoder.positions[place]
    for number, block in enumerate(decoder.blocks):
        memory = torch.cat([tokens.prefix[image], tokens.patches[image]])
        if decoder.looks:
            shown = [torch.cat([each.prefix[image], each.patches[image]]) for each in tokens.blocks]
            memory = sum(weight * each for weight, each in zip(decoder.mix.weight[number], shown, strict=True))
            memory = decoder.mixed_norms[number](memory)
        query, found = block.q(block.norm1(x)), []
        keys, values = (block.kv(memory)[:, part] for part in (slice(0, 12), slice(12, 24)))
        for head in (slice(0, 4), slice(4, 8), slice(8, 12)):
            scores = torch.stack([(query[head] * key[head]).sum() / math.sqrt(4) for key in keys]).exp()
            found.append(sum(score / scores.sum() * value[head] for score, value in zip(scores, values)))
        x = x + block.proj(torch.cat(found))
        x = x + block.mlp(block.norm2(x))
    return decoder.predict(decoder.norm(x))


@MIXED
def test_each_patch_by_a_slow_oracle(mixing: bool):
    decoder, tokens = painter(mixing=mixing)
    answer = decoder(tokens, KEEP, PLACES)
    for image in range(2):
        for place in range(16):
            painted = place in PLACES[image]
            expected = one_patch(decoder, tokens, image, place) if painted else torch.zeros(48).double()
            torch.testing.assert_close(answer[image, place], expected, rtol=1e-10, atol=1e-12)


@MIXED
def test_what_is_painted_of_a_patch_does_not_depend_on_the_others(mixing: bool):
    decoder, tokens = painter(mixing=mixing)
    some, all_of_them, whole = (decoder(tokens, KEEP, places) for places in (PLACES[:, :2], PLACES, None))
    rows = torch.arange(2)[:, None], PLACES[:, :2]
    torch.testing.assert_close(some[rows], all_of_them[rows], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(some[rows], whole[rows], rtol=1e-12, atol=1e-14)
    decoder, tokens = painter(attention="self")
    assert (decoder(tokens, KEEP, PLACES[:, :2])[rows] - decoder(tokens, KEEP, PLACES)[rows]).abs().max() > 1e-3


def test_the_mixture_begins_as_the_official_code_s():
    """Xavier-uniform, which overrides the normal numbers that its own class draws first."""
    weight = create("mae", {"decoder": {"dim": 12, "heads": 3, "attention": "cross", "mixing": True}}, SPEC).decoder.mix.weight
    assert weight.shape == (8, 3) and 0.4 < weight.abs().max() < math.sqrt(6 / 11)


@pytest.mark.parametrize("decode, num", [(1.0, 12), (0.5, 6)])
def test_only_removed_patches_are_painted_in_training_and_all_in_pictures(decode: float, num: int):
    task, asked = build("mae that looks across at all blocks"), []
    decoder = {"dim": 16, "depth": 1, "heads": 2, "attention": "cross", "mixing": True}
    mae = create("mae", {"decode": decode, "decoder": decoder}, task.encoder.spec).double()
    mae.decoder.blocks[0].register_forward_pre_hook(lambda block, given: asked.append(given[0].shape[1]))
    shown = batch(task)
    (images,) = (each.double() / 255 for each in shown.views.values())
    mae(Nets(task.encoder), {"image": images}, CLOCK, task.draw("mae", shown, CLOCK))
    pictures = mae.reconstruct(Nets(task.encoder), images, task.draw("mae", shown, CLOCK))
    assert asked == [num, 16]
    removed = (pictures.masked != pictures.original).any(dim=1)
    assert removed.double().mean() == pytest.approx(0.75, abs=0.01)
    assert torch.equal((pictures.pasted != pictures.original).any(dim=1), removed)


@pytest.mark.parametrize(
    "method, decoder, message",
    [
        ("mae", {"mixing": True}, r"objectives\.mae\.decoder.*mixing is of what attention=cross looks at, and attention=self"),
        ("can", {"attention": "cross"}, r"objectives\.can\.decoder\.attention=cross paints removed patches alone"),
        ("mae", {"attention": "cross", "dim": 10, "heads": 3}, "the decoder's width 10 is not divisible by its 3 heads"),
    ],
)
def test_decoders_that_cannot_be_are_refused(method: str, decoder: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        create(method, {"decoder": decoder}, SPEC)


def test_the_plain_mae_of_the_bench_has_no_such_decoder():
    with pytest.raises(ConfigError, match=r"--bench step: the plain MAE has no objectives\.mae\.decoder\.attention=cross"):
        plain_mae(build("mae that looks across"))
    assert len(plain_mae(build("mae")).decoder) == 1
