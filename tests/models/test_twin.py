"""The twin: an average by a slow oracle, fp32, without gradient, part of its owner's state once."""

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from vitssl.models.twin import Twin


class Owner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
        self.twin = Twin(self.student)


def move(module: nn.Module, number: int) -> None:
    """The student after another step."""
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn(parameter.shape, generator=generator)
        for buffer in module.buffers():
            buffer += 1


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.996, 1.0])
def test_it_is_the_average_by_a_slow_oracle(momentum: float):
    owner = Owner()
    expected = [parameter.detach().double() for parameter in owner.student.parameters()]
    for step in range(5):
        move(owner.student, step)
        owner.twin.update(momentum)
        news = [parameter.detach().double() for parameter in owner.student.parameters()]
        expected = [momentum * old + (1 - momentum) * new for old, new in zip(expected, news)]
    for found, wanted in zip(owner.twin.average.parameters(), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    for found, wanted in zip(owner.twin.average.buffers(), owner.student.buffers(), strict=True):
        assert torch.equal(found, wanted)


def test_it_equals_timms():
    owner, decay = Owner(), 0.99
    theirs = ModelEmaV3(owner.student, decay=decay)
    for step in range(10):
        move(owner.student, step)
        owner.twin.update(decay)
        theirs.update(owner.student)
    for ours, other in zip(owner.twin.average.parameters(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-6)


def test_it_still_moves_at_deits_momentum():
    """(1 - 0.99996) of a difference of one is more than half a unit in the last place of fp32, and less than that of bf16."""
    owner = Owner()
    before = copy.deepcopy(owner.twin.average)
    with torch.no_grad():
        for parameter in owner.student.parameters():
            parameter += 1
    owner.twin.update(0.99996)
    for old, new in zip(before.parameters(), owner.twin.average.parameters(), strict=True):
        torch.testing.assert_close(new - old, torch.full_like(old, 4e-5), rtol=0, atol=1e-6)


def test_a_student_in_half_precision_has_an_average_in_fp32():
    student = nn.Linear(2, 2).bfloat16()
    twin = Twin(student)
    move(student, 0)
    twin.update(0.5)
    assert all(parameter.dtype == torch.float32 for parameter in twin.average.parameters())


def test_it_has_no_gradient_no_dropout_and_stands_in_the_state_once():
    owner = Owner()
    owner.train()
    assert not any(module.training for module in owner.twin.modules()) and owner.student.training
    assert not any(parameter.requires_grad for parameter in owner.twin.parameters())
    names = list(owner.student.state_dict())
    assert list(owner.state_dict()) == [f"student.{name}" for name in names] + [f"twin.average.{name}" for name in names]
    assert len(list(owner.parameters())) == 2 * len(list(owner.student.parameters()))


def test_it_begins_where_the_student_begins():
    owner = Owner()
    move(owner.student, 0)
    owner.twin.restart()
    for ours, other in zip(owner.twin.average.state_dict().values(), owner.student.state_dict().values(), strict=True):
        assert torch.equal(ours, other)
        assert ours.data_ptr() != other.data_ptr()
