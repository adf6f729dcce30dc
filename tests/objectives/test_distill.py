"""Distillation of tokens and labels: what the teacher is shown, what is compared, and that nobody trains or saves it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from contract import CLOCK, batch, build, teacher_of

from vitssl.errors import ConfigError
from vitssl.models.spec import EncoderSpec
from vitssl.objectives import create
from vitssl.objectives.distill import regrid
from vitssl.train.optim import group_parameters

TOKENS = {"teacher": {"name": "tokens"}}
SPEC = EncoderSpec(dim=16, depth=2, heads=2, patch=(4, 4), grid=(4, 4), prefix=1)


def distance(own: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return (1 - F.cosine_similarity(own, F.layer_norm(teacher, teacher.shape[-1:], eps=1e-6), dim=-1)).mean()


def test_class_and_patch_tokens_by_hand():
    """The teacher's answer is of the same pixels under its own statistics."""
    task = build("distill")
    distill = task.objectives["distill"]
    shown = batch(task)
    pixels = next(iter(shown.views.values())).double() / 255
    own, teacher = task.encoder((pixels - 0.5) / 0.25), distill.companions()[0]
    with torch.no_grad():
        answer = teacher.network((pixels - 0.4) / 0.3)
    expected = distance(distill.heads["class"](own.prefix[:, 0]), answer.prefix[:, 0])
    expected = expected + distance(distill.heads["patches"](own.patches), answer.patches)
    loss, metrics = task(shown, CLOCK)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # views are normalised in fp32
    assert set(metrics) == {"distill/loss", "distill/class", "distill/patches"}


def test_labels_by_hand_weigh_a_sample_whatever_the_number_of_classes():
    task = build("distill labels")
    distill, shown = task.objectives["distill"], batch(task)
    pixels = next(iter(shown.views.values())).double() / 255
    student = distill.heads["labels"](task.encoder((pixels - 0.5) / 0.25).patches.mean(1)).log_softmax(-1)
    teacher = distill.companions()[0].network((pixels - 0.4) / 0.3).log_softmax(-1)
    loss, metrics = task(shown, CLOCK)
    torch.testing.assert_close(loss, (teacher.exp() * (teacher - student)).sum(-1).mean(), rtol=1e-5, atol=0)
    assert metrics["distill/agreement"] == (student.argmax(-1) == teacher.argmax(-1)).double().mean()


def test_patches_are_carried_to_the_student_s_grid():
    """A linear slope stays one, and halving averages what a triangle of the right width sees."""
    slope = torch.arange(6.0)[:, None] + torch.arange(4.0) * 10
    tokens = slope.reshape(1, 24, 1)
    assert regrid(tokens, (6, 4), (6, 4)) is tokens
    half = regrid(tokens, (6, 4), (3, 2)).reshape(3, 2)
    assert half[1, 0].item() == pytest.approx(2.5 + (half[0, 0] - half[0, 0]).item() + half[1, 0].item() - 2.5)
    torch.testing.assert_close(half[1] + half[1].flip(0), torch.full((2,), 2 * slope.mean().item()))  # centred
    twice = regrid(tokens, (6, 4), (12, 8)).reshape(12, 8)
    expected = torch.arange(12.0)[2:10, None] / 2 - 0.25 + torch.arange(8.0)[2:6] * 5 - 2.5
    torch.testing.assert_close(twice[2:10, 2:6], expected)


def test_a_teacher_with_larger_images_answers_on_another_grid():
    task = build("distill smaller patches by smooth L1")
    teacher, sizes = task.companions()[0], []
    teacher.network.register_forward_hook(lambda _, args, tokens: sizes.append((args[0].shape[-1], tokens.patches.shape[1])))
    task(batch(task), CLOCK)
    assert sizes == [(24, 36)]


def test_a_teacher_without_a_class_token_teaches_the_mean_of_its_patches():
    task = build("distill")
    distill = task.objectives["distill"]
    answer = task.encoder(torch.randn(2, 3, 16, 16).double())
    assert torch.equal(distill._target(answer, "class"), answer.prefix[:, 0])
    without = type(answer)(answer.prefix[:, :0], answer.patches, class_token=False)
    assert torch.equal(distill._target(without, "class"), answer.patches.mean(1))


def test_nobody_trains_counts_or_saves_the_teacher():
    task = build("distill").train()
    (teacher,) = task.companions()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    assert not any(part.training for part in teacher.network.modules())
    assert not [name for name in task.state_dict() if "network" in name or "teacher" in name]
    assert sum(group.size for group in group_parameters(task)) == sum(p.numel() for p in task.parameters())
    task(batch(task), CLOCK)[0].backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert task.float().companions()[0].mean.dtype == torch.float32  # where the task goes, it goes


@pytest.mark.parametrize(
    "settings, spec, message",
    [
        ({}, SPEC, "objectives.distill.teacher: has no value and needs one"),
        ({"teacher": {}}, SPEC, "objectives.distill.teacher.name: has no value and needs one"),
        (
            TOKENS,
            replace(SPEC, channels=1),
            "name=tokens: looks at 3 channels, and encoder.channels=1",
        ),
        (TOKENS, replace(SPEC, prefix=0, class_token=False), "objectives.distill.pooling=class needs a class token"),
    ],
)
def test_what_cannot_be_taught_is_refused(settings: dict, spec: EncoderSpec, message: str):
    with pytest.raises(ConfigError, match=message):
        create("distill", settings, spec, teacher=teacher_of(TOKENS))
