"""MSN against its paper, choice by choice: sharpened, evened out, predicted; what is hidden from whom; and what it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F
from contract import CLOCK, batch, build
from torch import Tensor, nn

from vitssl.errors import ConfigError
from vitssl.models.spec import EncoderSpec
from vitssl.objectives import create
from vitssl.train.optim import group_parameters

SPEC = EncoderSpec(dim=8, depth=1, heads=2, patch=(4, 4), grid=(4, 4), prefix=1)
SMALL = {"hidden": 4, "out": 8, "prototypes": 6, "crops": {"local_size": 8, "num_local": 2}}


def choice(row: Tensor, prototypes: Tensor) -> Tensor:
    """[P]: by the cosines, at a temperature of 0.1 (equation 1's p)."""
    scores = torch.stack([F.cosine_similarity(row, prototype, dim=0) / 0.1 for prototype in prototypes])
    return scores.exp() / scores.exp().sum()


def evened(table: Tensor) -> Tensor:
    """[rows, P] made to sum to the same over rows and over prototypes in turn, three times, as the official code does."""
    for _ in range(3):
        table = table / table.sum(dim=0) / table.shape[1]
        table = table / table.sum(dim=1, keepdim=True) / table.shape[0]
    return table * table.shape[0]


@pytest.mark.parametrize("sinkhorn", [True, False])
def test_the_loss_by_a_slow_oracle(sinkhorn: bool):
    torch.manual_seed(0)
    objective = create("msn", SMALL | {"sinkhorn": sinkhorn, "me_max": 0.7}, SPEC).double().train()
    objective.head.mlp, objective.goals = nn.Identity(), nn.Identity()
    anchor, focal, target = torch.randn(5, 8).double(), torch.randn(5, 2, 8).double(), torch.randn(5, 8).double()
    loss, metrics = objective.compare({"anchor": anchor, "focal": focal}, {"target": target}, CLOCK)
    prototypes = objective.head.last_layer.weight_v
    sharp = torch.stack([choice(row, prototypes) ** (1 / 0.25) for row in target])
    sharp = sharp / sharp.sum(dim=1, keepdim=True)
    goals = evened(sharp) if sinkhorn else sharp
    pairs = [(choice(row, prototypes), goals[b]) for b in range(5) for row in (anchor[b], *focal[b])]
    prediction = sum(-(goal * p.log()).sum() for p, goal in pairs) / len(pairs)
    mean = sum(p for p, _ in pairs) / len(pairs)
    evenness = math.log(6) + (mean * mean.log()).sum()
    expected = prediction + 0.7 * evenness
    for value, own in {"loss": expected, "prediction": prediction, "me_max": evenness}.items():
        torch.testing.assert_close(metrics[value], own.detach(), rtol=1e-10, atol=0)
    assert torch.equal(metrics["loss"], loss.detach())
    torch.testing.assert_close(metrics["entropy"], -(goals * goals.log()).sum(dim=1).mean().detach() / math.log(6))
    torch.testing.assert_close(metrics["usage"], (math.log(6) - evenness).exp().detach())


def test_no_gradient_reaches_the_prototypes_through_the_targets():
    """The gradient is that of anchors alone: with targets kept as numbers, the slow loss has the same."""
    torch.manual_seed(0)
    objective = create("msn", SMALL | {"sinkhorn": False, "crops": {"num_local": 0}}, SPEC).double().train()
    objective.head.mlp, objective.goals = nn.Identity(), nn.Identity()
    anchor, target = torch.randn(5, 8).double(), torch.randn(5, 8).double()
    loss, _ = objective.compare({"anchor": anchor}, {"target": target}, CLOCK)
    prototypes = objective.head.last_layer.weight_v
    chosen = torch.stack([choice(row, prototypes) for row in anchor])
    goals = torch.stack([choice(row, prototypes.detach()) ** 4 for row in target])
    mean = chosen.mean(dim=0)
    slow = -(goals / goals.sum(dim=1, keepdim=True) * chosen.log()).sum(dim=1).mean() + (mean * mean.log()).sum()
    found, wanted = (torch.autograd.grad(each, prototypes)[0] for each in (loss, slow))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-13)


def test_only_the_large_anchor_is_masked_and_each_image_by_a_draw_of_its_own():
    task, seen = build("msn"), []

    def see(module, images, doors):
        seen.append(([(len(each), each.shape[-1]) for each in (*images, *doors.get("others", ()))], doors.get("keep")))

    for encoder in (task.encoder, task.teacher.average):
        encoder.vit.register_forward_pre_hook(see, with_kwargs=True)
    task.train()(batch(task), CLOCK)
    (anchors, keep), (targets, whole) = seen
    assert (anchors, targets, whole) == ([(16, 16), (32, 8)], [(16, 16)], None)
    assert keep.shape == (16, int(16 * 0.85)) and all(len(set(row)) == len(row) for row in keep.tolist())
    assert len({tuple(sorted(row)) for row in keep.tolist()}) > 8
    assert [stack.tokens for stack in task.stacks()] == [1 + 13, 1 + 4, 1 + 4]


def test_anchors_of_one_size_share_statistics_and_targets_have_their_own():
    """As in the official code, whose heads see one size at a time."""
    objective, seen = create("msn", SMALL, SPEC).train(), []
    for mlp in (objective.head.mlp, objective.goals.average):
        mlp[1].register_forward_pre_hook(lambda norm, rows: seen.append((len(rows[0]), norm.training)))
    rows = {"anchor": torch.randn(5, 8), "focal": torch.randn(5, 2, 8)}
    objective.compare(rows, {"target": torch.randn(5, 8)}, CLOCK)
    assert seen == [(5, True), (10, True), (5, True)]


def test_views_are_two_large_and_ten_small_and_prototypes_do_not_decay():
    views = create("msn", {"hidden": 4, "crops": {"local_size": 8}}, SPEC).views()
    assert [view.size for view in views.values()] == [(16, 16)] * 2 + [(8, 8)] * 10
    assert {(view.scale, view.photometric.saturation, view.interpolation) for view in views.values()} == {
        ((0.3, 1.0), 0.4, "bilinear"),
        ((0.05, 0.3), 0.4, "bilinear"),
    }
    groups = {group.rule.name: group for group in group_parameters(build("msn"))}
    assert groups["msn.prototypes"].rule.weight_decay == 0 and groups["msn.prototypes"].size == 12 * 8
    assert groups["msn.decay"].rule.weight_decay == 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"mask_ratio": 0.95}, r"objectives\.msn\.mask_ratio=0.95 keeps none of 16 patches; keep one with at most 0.9375"),
        ({"mask_ratio": 0}, r"objectives\.msn\.mask_ratio.*greater than 0"),
        ({"crops": {"local_size": 10}}, r"objectives\.msn\.crops\.local_size: images of 10x10 is not divisible"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        create("msn", SMALL | settings, SPEC)
