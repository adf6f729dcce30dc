"""Parameters that wait keep every bit, and begin afterwards as if the optimiser had never stepped."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from vitssl.config import build
from vitssl.errors import ConfigError
from vitssl.schedule import Duration
from vitssl.sections import OptimConfig, ProgramConfig
from vitssl.task import Rule, Task, decay_rules
from vitssl.train.optim import MOMENTS, build_optimizer, group_parameters
from vitssl.train.planning import make_plan
from vitssl.train.waiting import Waiting

STEPS = 3
SHAPES = {"stem": (4, 3), "head": (2, 4), "bias": (2,), "last": (5, 2)}
RULES = [
    Rule("stem", "stem", waits=Duration(STEPS, "steps")),
    Rule("last", "last", waits=Duration(1, "steps")),
    *decay_rules("head|bias"),
]


class Trained:
    """A task with its optimiser, stepped as the engine does; gradients are of a function of the step."""

    def __init__(self, task: Task, config: OptimConfig, *, waits: bool = True) -> None:
        self.task = task
        rules = [group.rule for group in group_parameters(task) if group.rule.waits]
        found = {rule.name: int(rule.waits.value) for rule in rules} if waits else {}
        self.optimizer = build_optimizer(task, config, lr=0.1, device=torch.device("cpu"), waits=found)
        self.waiting = Waiting(self.optimizer)

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


def filled(ruled: type) -> Task:
    task = ruled(SHAPES, RULES)
    generator = torch.Generator().manual_seed(7)
    for parameter in task.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return task


@pytest.mark.parametrize("name", MOMENTS)
def test_each_keeps_its_values_for_its_own_time_then_begins_anew(ruled: type, name: str) -> None:
    config = OptimConfig(name=name, weight_decay=0.3, betas=(0.9, 0.999))
    trained = Trained(filled(ruled), config)
    before = trained.state()
    for number in range(STEPS):
        trained.step(number)
        now = trained.state()
        still = {key for key in now if torch.equal(now[key], before[key])}
        assert still == ({"stem", "last"} if number == 0 else {"stem"})
    state = trained.optimizer.state[trained.task.stem]
    assert not any(state[moment].any() for moment in MOMENTS[name]) and not state.get("step", 0)
    assert trained.optimizer.state[trained.task.last].get("step", STEPS - 1) == STEPS - 1
    fresh = Trained(filled(ruled), config, waits=False)
    fresh.task.load_state_dict(trained.task.state_dict())
    for number in (STEPS, STEPS + 1):
        trained.step(number)
        fresh.step(number)
    ours, theirs = trained.state(), fresh.state()
    assert torch.equal(ours["stem"], theirs["stem"]) and not torch.equal(ours["stem"], before["stem"])
    assert not torch.equal(ours["head"], theirs["head"]) and not torch.equal(ours["last"], theirs["last"])


def test_the_rate_of_those_that_do_not_wait_is_the_schedules(ruled: type) -> None:
    trained = Trained(filled(ruled), OptimConfig(weight_decay=0.3))
    for number in (0, STEPS - 1, STEPS):
        trained.step(number, lr=0.5)
        for group in trained.optimizer.param_groups:
            held = number < {"stem": STEPS, "last": 1}.get(group["rule"], 0)
            decay = 0.0 if group["rule"] == "no_decay" else 0.3
            assert (group["lr"], group["weight_decay"]) == ((0.0, 0.0) if held else (0.5, decay))


def test_the_encoder_of_a_run_is_two_rules_that_wait(small_mae: Callable) -> None:
    task = small_mae()
    assert [group.rule.name for group in group_parameters(task)] == ["decay", "no_decay"]
    task.waits = Duration(2, "steps")
    groups = {group.rule.name: group for group in group_parameters(task)}
    assert list(groups) == ["decay", "no_decay", "encoder.decay", "encoder.no_decay"]
    waiting = {name for key, group in groups.items() if group.rule.waits for name in group.names}
    assert waiting == {name for name, p in task.named_parameters() if name.startswith("encoder.") and p.requires_grad}


IMAGES = SimpleNamespace(num_samples=80, ignored=0, by_chunk=False)
CONFIG = build(ProgramConfig, {"batch_size": 8, "length": "4ep", "launch": {"device": "cpu"}}, where="here")


@pytest.mark.parametrize("text, steps", [("1ep", 10), ("5%", 2), ("3", 3), ("0.01ep", 0)])
def test_the_plan_turns_it_into_steps(small_mae: Callable, text: str, steps: int) -> None:
    task = small_mae()
    task.objectives["mae"].param_rules = lambda: [Rule("all", ".*", waits=Duration.parse(text))]
    plan = make_plan(CONFIG, task, IMAGES)
    assert plan.waits == ({"mae.all": steps} if steps else {})
    told = f"{steps} steps in which mae.all keeps its weights"
    assert [value for key, value in plan.lines() if key == "wait"] == ([told] if steps else [])
    assert make_plan(CONFIG, task, IMAGES, waits={"mae.all": 7}).waits == {"mae.all": 7}, "as the run was begun"
    assert make_plan(CONFIG, task, IMAGES, waits={}).waits == {}


def test_one_that_would_never_train_is_refused(small_mae: Callable) -> None:
    task = small_mae()
    task.objectives["mae"].param_rules = lambda: [Rule("all", ".*", waits=Duration(4, "ep"))]
    with pytest.raises(ConfigError, match=r"the wait of mae.all=4ep: that would wait for 40 steps and the run has 40, so"):
        make_plan(CONFIG, task, IMAGES)
