"""MAE's options: masks of square blocks, and a decoder that paints a part of what was removed. Against slow oracles."""

import pytest
import torch
from contract import CLOCK, batch, build

from vitssl.errors import ConfigError
from vitssl.losses.pixels import patchify
from vitssl.masks.random import in_blocks
from vitssl.models.spec import EncoderSpec
from vitssl.objectives import create
from vitssl.objectives.base import Nets

SPEC = EncoderSpec(dim=16, depth=2, heads=2, patch=(4, 4), grid=(4, 6), prefix=1)
SMALL = {"decoder": {"dim": 16, "depth": 1, "heads": 2}}


def test_blocks_by_a_slow_oracle():
    order = torch.tensor([[5, 0], [3, 1]])
    expected = [[16, 17, 22, 23, 0, 1, 6, 7], [12, 13, 18, 19, 2, 3, 8, 9]]  # of 4x6 patches, 2x3 blocks
    assert in_blocks(order, (4, 6), 2).tolist() == expected
    assert torch.equal(in_blocks(order, (4, 6), 1), order)


@pytest.mark.parametrize("block", [1, 2])
def test_what_is_removed_is_whole_blocks(block: int):
    mae = create("mae", {"mask_ratio": 0.6, "block": block} | SMALL, SPEC)
    keep, places, mask = mae._masks(torch.rand(3, mae.num_blocks, dtype=torch.float64), decode=None)
    assert places is None and keep.shape == (3, mae.num_keep)
    for b in range(3):
        assert sorted(keep[b].tolist()) == [n for n in range(24) if not mask[b, n]]
        for n in range(24):
            corner = n // 6 // block * block * 6 + n % 6 // block * block
            assert mask[b, n] == mask[b, corner]


@pytest.mark.parametrize("block, decode, positions", [(1, 0.25, "sincos"), (2, 0.5, "sincos"), (1, 0.5, "learned")])
def test_a_part_is_painted_as_if_the_rest_were_not_there(block: int, decode: float, positions: str):
    """Token by token, from the places that the noise gives them."""
    task = build("mae + moco_v3")
    spec, images = task.encoder.spec, next(iter(batch(task, num=2).views.values())).double() / 255
    painter = {"decoder": SMALL["decoder"] | {"positions": positions}}
    mae = create("mae", {"mask_ratio": 0.5, "block": block, "decode": decode} | painter, spec).double()
    noise = torch.rand(2, mae.num_blocks, dtype=torch.float64)
    found = mae.embed(Nets(task.encoder), {"image": images}, lambda name, num: noise)["error"]
    decoder, width = mae.decoder, 4 // block
    for b in range(2):
        order = sorted(range(mae.num_blocks), key=lambda n: noise[b, n].item())
        inside = [
            [(n // width * block + i) * 4 + n % width * block + j for i in range(block) for j in range(block)] for n in order
        ]
        kept = [n for some in inside[: mae.num_blocks // 2] for n in some]
        num = round(decode * mae.num_blocks / 2)
        painted = [n for some in inside[mae.num_blocks // 2 :][:num] for n in some]
        assert (len(kept), len(painted)) == (mae.num_keep, mae.num_painted)
        tokens = task.encoder(images[b : b + 1], keep=torch.tensor([kept]))
        row = [decoder.embed(tokens.prefix[0, 0]) + (decoder.pos_embed[0, 0] if positions == "learned" else 0.0)]
        row += [decoder.embed(token) + decoder.positions[n] for n, token in zip(kept, tokens.patches[0])]
        row += [decoder.mask_token[0, 0] + decoder.positions[n] for n in painted]
        answer = decoder.predict(decoder.norm(decoder.blocks(torch.stack(row)[None])))[0, -len(painted) :]
        target = patchify(images[b : b + 1], (4, 4))[0, painted]
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(found[b], (answer - target).square().mean(), rtol=1e-9, atol=0)


def test_a_part_costs_a_shorter_decoder_and_pictures_are_whole():
    task = build("mae in blocks, a part painted")
    mae, whole = task.objectives["mae"], create("mae", SMALL, task.encoder.spec)
    assert (mae.stacks()[1].tokens, whole.stacks()[1].tokens) == (1 + 4 + 4, 1 + 16)
    (images,) = batch(task).views.values()
    pictures = mae.reconstruct(Nets(task.encoder), images.double() / 255, task.draw("mae", batch(task), CLOCK))
    assert (pictures.pasted - pictures.masked).abs().amax(1).ne(0).double().mean() > 0.7


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"block": 4}, "objectives.mae.block=4 does not divide the 4x6 patches"),
        ({"block": 2, "mask_ratio": 0.9}, "objectives.mae.mask_ratio=0.9 keeps none of 6 blocks; keep one with at most 0.8333"),
        ({"decode": 0}, "decode"),
    ],
)
def test_options_that_cannot_be_are_refused(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        create("mae", settings | SMALL, SPEC)
