"""CAN against a slow oracle: each view of each image by itself, noise and contrast number by number."""

import math

import pytest
import torch
from contract import CLOCK, ROWS, batch, build
from torch import Tensor

from vitssl.errors import ConfigError
from vitssl.losses.pixels import patchify
from vitssl.models.spec import EncoderSpec
from vitssl.objectives import create
from vitssl.objectives.base import Nets
from vitssl.objectives.mixture import Mixture

CAN = {"decoder": {"dim": 16, "depth": 1, "heads": 2}, "out": 8}


def shown(task: Mixture, num: int) -> dict[str, Tensor]:
    """The views of the first samples as the objective is given them."""
    return next(views for _, _, views in task._shown(batch(task, slice(0, num)), CLOCK))


def numbers(task: Mixture, name: str, num: int, rows: int) -> list[list[float]]:
    return task.draw("can", batch(task, slice(0, rows)), CLOCK)(name, num).tolist()


def normals(uniform: list[float]) -> list[float]:
    half = len(uniform) // 2
    pairs = [(math.sqrt(-2 * math.log(1 - u)), 2 * math.pi * v) for u, v in zip(uniform[:half], uniform[half:])]
    return [r * math.cos(a) for r, a in pairs] + [r * math.sin(a) for r, a in pairs]


def one_view(task: Mixture, image: Tensor, mask: list[float], level: float, noise: list[float]) -> tuple[Tensor, ...]:
    """(pooled shown patches [D], error of the removed patches, error of the noise) of image [C, H, W]."""
    can, spec = task.objectives["can"], task.encoder.spec
    keep = sorted(range(16), key=lambda n: mask[n])[:8]
    patches = patchify(image[None], spec.patch)[0]
    spread = 0.05 * level * torch.tensor(normals(noise)).reshape(8, 48)
    noisy = image.clone()
    for n, own in zip(keep, spread):
        row, column = n // 4 * 4, n % 4 * 4
        noisy[:, row : row + 4, column : column + 4] += own.reshape(4, 4, 3).permute(2, 0, 1)
    tokens = task.encoder(noisy[None], keep=torch.tensor([keep]))
    angles = torch.tensor([1000 * level / 10000 ** (i / 64) for i in range(64)])
    told = can.level(torch.cat([angles.sin(), angles.cos()]).to(image.dtype))
    row = [can.decoder.embed(tokens.prefix[0, 0] + told)]
    for n in range(16):
        patch = can.decoder.embed(tokens.patches[0, keep.index(n)] + told) if n in keep else can.decoder.mask_token[0, 0]
        row.append(patch + can.decoder.positions[n])
    painted = can.decoder.predict(can.decoder.norm(can.decoder.blocks(torch.stack(row)[None])))[0, 1:]
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    removed = [(painted[n] - target[n]).square().mean() for n in range(16) if n not in keep]
    seen = [(painted[n] - own).square().mean() for n, own in zip(keep, spread)]
    return tokens.patches[0].mean(0), sum(removed) / 8, sum(seen) / 8


def test_by_a_slow_oracle():
    task, rows = build("can"), 3
    can, views = task.objectives["can"], shown(task, rows)
    found = {"first": [], "second": [], "reconstruction": 0.0, "denoising": 0.0}
    for view, which, suffix in (("image", "first", ""), ("other", "second", ".other")):
        mask, noise = numbers(task, f"mask{suffix}", 16, rows), numbers(task, f"noise{suffix}", 8 * 48, rows)
        level = numbers(task, f"level{suffix}", 1, rows)
        for b in range(rows):
            pooled, *errors = one_view(task, views[view][b], mask[b], level[b][0], noise[b])
            found[which].append(can.projector(pooled).detach())
            for name, error in zip(("reconstruction", "denoising"), errors):
                found[name] += float(error.detach()) / (2 * rows)
    everybody = [(each / each.norm()).detach() for each in found["first"] + found["second"]]
    contrast = 0.0
    for i, anchor in enumerate(everybody):
        terms = [math.exp(float(anchor @ other) / 0.1) for j, other in enumerate(everybody) if j != i]
        contrast -= math.log(math.exp(float(anchor @ everybody[(i + rows) % (2 * rows)]) / 0.1) / sum(terms)) / (2 * rows)
    loss, metrics = task(batch(task, slice(0, rows)), CLOCK)
    expected = {"contrast": contrast, "reconstruction": found["reconstruction"], "denoising": found["denoising"]}
    for name, value in expected.items():
        assert float(metrics[f"can/{name}"]) == pytest.approx(value, rel=1e-5), name  # the noise is drawn in fp32
    told = 0.03 * contrast + 0.67 * expected["reconstruction"] + 0.3 * expected["denoising"]
    assert float(loss.detach()) == pytest.approx(told, rel=1e-5)


def test_both_views_go_through_the_encoder_once():
    task, calls = build("can"), []
    task.encoder.register_forward_hook(lambda _, args, tokens: calls.append(tuple(tokens.patches.shape)))
    task(batch(task), CLOCK)
    assert calls == [(2 * ROWS, 8, 16)]


def test_a_plan_counts_both_views():
    mae, can = build("mae").objectives["mae"].stacks(), build("can").objectives["can"].stacks()
    assert [each.tokens for each in can] == [1 + 8, 1 + 16] * 2 and [each.tokens for each in mae] == [1 + 4, 1 + 16]


def test_without_noise_the_views_are_as_they_are():
    """Then removed and shown patches of a picture are what MAE makes of it, and nothing is said of a level."""
    task = build("can without noise, with BatchNorm")
    _, metrics = task(batch(task), CLOCK)
    assert "can/denoising" not in metrics and task.objectives["can"].level is None


def test_pictures_are_of_the_first_view_without_noise():
    task = build("can", dtype=torch.float32)
    own = batch(task)
    image = task.objectives["can"].views()["image"]
    pictures = task.pictures(own, CLOCK)
    assert pictures.shape == (ROWS, 4, 3, 16, 16) and image.copy == 0
    levels = []
    task.objectives["can"].level.register_forward_hook(lambda _, args, answer: levels.append(args[0]))
    task.pictures(own, CLOCK)
    assert torch.equal(levels[0][:, 64:], torch.ones(ROWS, 64))  # cosines of level 0


def test_it_says_its_own_name_in_errors():
    spec = EncoderSpec(dim=16, depth=2, heads=2, patch=(4, 4), grid=(4, 4), prefix=1)
    with pytest.raises(ConfigError, match=r"objectives.can.mask_ratio=0.99 keeps none of 16 patches"):
        create("can", CAN | {"mask_ratio": 0.99}, spec)


def test_noise_is_fresh_for_each_view_and_only_on_what_is_shown():
    task = build("can", dtype=torch.float32)
    can, seen = task.objectives["can"], {}
    task.encoder.register_forward_pre_hook(
        lambda _, args, options: seen.update(images=args[0], keep=options["keep"]), with_kwargs=True
    )
    views = shown(task, ROWS)
    can.embed(Nets(task.encoder), views, task.draw("can", batch(task), CLOCK))
    noise = patchify(seen["images"] - torch.cat([views["image"], views["other"]]), (4, 4))
    kept = torch.zeros(2 * ROWS, 16, dtype=torch.bool).scatter_(1, seen["keep"], True)
    assert not noise[~kept].any() and noise[kept].ne(0).double().mean() > 0.9
    deviations = noise[kept].reshape(2 * ROWS, -1).std(dim=1)
    assert deviations.min() > 0 and deviations.max() < 0.055 and 0.01 < deviations.mean() < 0.04
    assert not torch.allclose(deviations[:ROWS], deviations[ROWS:], rtol=0.01)
