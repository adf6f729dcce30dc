"""An encoder that waits keeps every bit, and begins afterwards as if the optimiser had never stepped."""

from collections.abc import Callable

import pytest
import torch

from vitssl.sections import OptimConfig
from vitssl.task import Task
from vitssl.train.optim import MOMENTS, build_optimizer
from vitssl.train.waiting import Waiting

STEPS = 3


class Trained:
    """A task with its optimiser, stepped as the engine does; gradients are of a function of the step."""

    def __init__(self, task: Task, config: OptimConfig, *, steps: int) -> None:
        self.task, self.waiting = task, Waiting(task, steps)
        options = {"lr": 0.1, "device": torch.device("cpu"), "waiting": self.waiting.names}
        self.optimizer = build_optimizer(task, config, **options)

    def step(self, number: int, *, lr: float = 0.01) -> None:
        self.waiting.begin_step(number, self.optimizer, lr=lr, weight_decay=0.3)
        generator = torch.Generator().manual_seed(number)
        parameters = [parameter for parameter in self.task.parameters() if parameter.requires_grad]
        sum((p * torch.randn(p.shape, generator=generator)).sum() for p in parameters).backward()
        self.optimizer.step()
        self.waiting.end_step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.task.named_parameters()}


@pytest.mark.parametrize("name", MOMENTS)
def test_it_keeps_its_weights_then_begins_anew(small_mae: Callable, name: str) -> None:
    config = OptimConfig(name=name, weight_decay=0.3, betas=(0.9, 0.999))
    trained = Trained(small_mae(), config, steps=STEPS)
    before = trained.state()
    encoder = trained.waiting.names
    assert encoder == {key for key, p in trained.task.named_parameters() if key.startswith("encoder.") and p.requires_grad}
    for number in range(STEPS):
        trained.step(number)
    now = trained.state()
    assert all(torch.equal(now[key], before[key]) for key in encoder)
    assert all(not torch.equal(now[key], before[key]) for key in now if key.startswith("objectives."))
    for key, parameter in trained.task.named_parameters():
        if key in encoder:
            state = trained.optimizer.state[parameter]
            assert not any(state[moment].any() for moment in MOMENTS[name]) and not state.get("step", 0)
    fresh = Trained(small_mae(), config, steps=0)
    fresh.task.load_state_dict(trained.task.state_dict())
    for number in (STEPS, STEPS + 1):
        trained.step(number)
        fresh.step(number)
    ours, theirs = trained.state(), fresh.state()
    assert all(torch.equal(ours[key], theirs[key]) and not torch.equal(ours[key], before[key]) for key in encoder)
    assert any(not torch.equal(ours[key], theirs[key]) for key in ours if key not in encoder)


def test_nothing_waits_where_nothing_was_given(small_mae: Callable) -> None:
    """The groups of a run from scratch are those they were: one a rule."""
    task = small_mae()
    assert not Waiting(task, 0).names
    rules = [group["rule"] for group in build_optimizer(task, OptimConfig(), lr=1.0, device=torch.device("cpu")).param_groups]
    assert rules == ["decay", "no_decay"]
    trained = Trained(task, OptimConfig(), steps=2)
    held = {(group["rule"], group["waits"]) for group in trained.optimizer.param_groups}
    assert held == {(rule, waits) for rule in rules for waits in (False, True)}


def test_the_heads_rate_is_the_schedules(small_mae: Callable) -> None:
    trained = Trained(small_mae(), OptimConfig(weight_decay=0.3), steps=STEPS)
    for number in (0, STEPS - 1, STEPS):
        trained.step(number, lr=0.5)
        for group in trained.optimizer.param_groups:
            held = group["waits"] and number < STEPS
            decay = 0.3 if group["rule"] == "decay" else 0.0
            assert (group["lr"], group["weight_decay"]) == ((0.0, 0.0) if held else (0.5, decay))
