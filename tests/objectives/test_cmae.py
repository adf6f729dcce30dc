"""CMAE against its parts, one by one: what each network is shown, what is contrasted, the loss; and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from contract import CLOCK, batch, build
from torch import nn

from vitssl.errors import ConfigError
from vitssl.models.spec import EncoderSpec
from vitssl.objectives import create
from vitssl.objectives.cmae import shifted

SPEC = EncoderSpec(dim=8, depth=1, heads=2, patch=(4, 4), grid=(4, 4), prefix=1)
SMALL = {"hidden": 8, "out": 8, "shift": 4, "decoder": {"dim": 8, "depth": 1, "heads": 2}}


def test_shifting_is_cutting_elsewhere():
    images, shifts = torch.randn(3, 2, 9, 8), torch.tensor([[0, 0], [3, 1], [2, 2]])
    found = shifted(images, shifts, (6, 6))
    for image, (down, right), cut in zip(images, shifts.tolist(), found, strict=True):
        assert torch.equal(cut, image[:, down : down + 6, right : right + 6])


def test_both_views_are_one_crop_and_the_target_has_other_colours():
    image, target = create("cmae", SMALL | {"shift": 32}, SPEC).views().values()
    assert (image.size, image.scale, image.purpose) == ((48, 48), (0.2, 1.0), target.purpose)
    assert not image.photometric.changes and target.photometric.jitter == 0.8


def test_who_is_shown_what():
    """The student blocks of two by two patches of the corner; the teacher all of a cut that the draw places."""
    task, seen = build("cmae"), []
    for encoder in (task.encoder, task.teacher.average):
        encoder.register_forward_pre_hook(
            lambda _, images, options: seen.append((images[0], options.get("keep"))), with_kwargs=True
        )
    task.train()(batch(task), CLOCK)
    (corner, keep), (cut, everything) = seen
    views = next(views for _, _, views in task._shown(batch(task), CLOCK))
    assert torch.equal(corner, views["image"][..., :16, :16]) and everything is None
    draw = task.draw("cmae", batch(task), CLOCK)
    places = (draw("shift", 2) * 4).long().tolist()
    assert len({tuple(place) for place in places}) > 4 and {side for place in places for side in place} == {0, 1, 2, 3}
    for image, (down, right), own in zip(views["target"], places, cut, strict=True):
        assert torch.equal(own, image[:, down : down + 16, right : right + 16])
    for row in keep.tolist():  # one block of four is kept
        assert sorted(n - min(row) for n in row) == [0, 1, 4, 5] and min(row) in (0, 2, 8, 10)


def test_what_is_contrasted():
    """The student's: what its second decoder makes of all patches; the teacher's: patches before the final norm."""
    task = build("cmae").eval()
    objective, shown = task.objectives["cmae"], batch(task)
    views, draw = next(views for _, _, views in task._shown(shown, CLOCK)), task.draw("cmae", shown, CLOCK)
    feature = objective.embed(task._nets, views, draw)["feature"]
    keep, _, _ = objective._masks(draw("mask", 4), decode=None)
    patches = objective.feature_decoder(task.encoder(views["image"][..., :16, :16], keep=keep), keep)
    assert patches.shape == (16, 16, 16)
    torch.testing.assert_close(feature, sum(patches.unbind(1)) / 16)
    cut, outputs = shifted(views["target"], (draw("shift", 2) * 4).long(), (16, 16)), []
    task.teacher.average.vit.blocks[-1].register_forward_hook(lambda block, given, output: outputs.append(output))
    target = objective.targets(task._nets, views, draw)["target"]
    assert not target.requires_grad
    torch.testing.assert_close(target, outputs[0][:, 1:].mean(dim=1))
    task.teacher(cut)
    torch.testing.assert_close(outputs[1], outputs[0])


def test_the_loss_by_a_slow_oracle():
    torch.manual_seed(0)
    objective = create("cmae", SMALL | {"reconstruction": 0.5, "contrast": 3.0}, SPEC).double().train()
    objective.projector, objective.keys = nn.Identity(), nn.Identity()
    objective.predictor = nn.Linear(8, 8).double()
    feature, target, error = torch.randn(5, 8).double(), torch.randn(5, 8).double(), torch.rand(5).double()
    loss, metrics = objective.compare({"feature": feature, "error": error}, {"target": target}, CLOCK)
    queries, contrast = objective.predictor(feature), 0.0
    for b in range(5):
        scores = torch.stack([F.cosine_similarity(queries[b], key, dim=0) / 0.07 for key in target]).exp()
        contrast = contrast - 2 * 0.07 * (scores[b] / scores.sum()).log() / 5
    torch.testing.assert_close(loss, 0.5 * error.mean() + 3.0 * contrast, rtol=1e-10, atol=0)
    torch.testing.assert_close(metrics["contrast"], contrast.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(metrics["reconstruction"], error.mean(), rtol=1e-12, atol=0)


def test_pictures_are_of_the_masked_corner_and_the_plan_counts_both_decoders():
    task = build("cmae", dtype=torch.float32)
    pictures = task.pictures(batch(task), CLOCK)
    assert pictures.shape == (16, 4, 3, 16, 16)
    objective = create("cmae", SMALL | {"feature_depth": 3}, SPEC)
    assert [(stack.tokens, stack.depth) for stack in objective.stacks()] == [(1 + 4, 1), (1 + 16, 1), (1 + 16, 3)]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"shift": 6}, r"objectives\.cmae\.shift=6: a crop of 22x22 is not divisible by patches of 4x4; nearest: 24x24"),
        ({"shift": 0}, r"objectives\.cmae\.shift"),
        ({"mask_ratio": 0.8}, r"objectives\.cmae\.mask_ratio=0\.8 keeps none of 4 blocks; keep one with at most 0\.75"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        create("cmae", SMALL | settings, SPEC)
