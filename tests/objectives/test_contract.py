"""Every objective of the table: what its loss, its gradients and its teacher must be, on any number of processes and parts."""

import re

import pytest
import torch
from contract import CASES, CLOCK, batch, build, gradients, step_of_process

from vitssl import objectives
from vitssl.models.twin import Twin

EVERY = pytest.mark.parametrize("case", CASES)


def test_every_method_is_in_the_table():
    assert {name for case in CASES.values() for name in case.objectives} == set(objectives.names())


@EVERY
def test_the_loss_is_finite_and_reaches_all_that_trains(case: str):
    task = build(case).train()
    loss, metrics = task(batch(task), CLOCK)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(value) and not value.requires_grad and value.ndim == 0 for value in metrics.values())
    for name, parameter in task.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
        elif not any(re.search(pattern, name) for pattern in CASES[case].frozen):
            assert parameter.grad is not None, f"no gradient reaches {name}"
            assert parameter.grad.abs().max() > 0, f"the gradient of {name} is 0"
    for part in task.modules():
        assert not isinstance(part, Twin) or all(not p.requires_grad for p in part.parameters())


@EVERY
def test_the_same_step_has_the_same_loss(case: str):
    first, second = (build(case).train()(batch(build(case)), CLOCK)[0] for _ in range(2))
    assert torch.equal(first, second)


@EVERY
def test_every_view_is_looked_at(case: str):
    task = build(case).train()
    shown = batch(task)
    before, _ = task(shown, CLOCK)
    for view in task.views:
        other = {each: 255 - images if each == view else images for each, images in shown.views.items()}
        assert not torch.equal(build(case).train()(type(shown)(other, shown.positions), CLOCK)[0], before), view


@EVERY
@pytest.mark.parametrize("processes, parts", [(1, 4), (2, 1), (2, 2), (4, 1)])
def test_processes_and_parts_change_nothing(case: str, processes: int, parts: int, gang):
    """The gradient of the batch in one piece, to 1e-9 in float64: as DDP averages it, and accumulated."""
    loss, expected, state = step_of_process(case, 1)
    found = [step_of_process(case, parts)] if processes == 1 else gang(processes)(step_of_process, case, parts)
    for own_loss, own, own_state in found:
        assert float(own_loss) == pytest.approx(float(loss), rel=1e-6)  # told in fp32
        for name, gradient in expected.items():
            near = CASES[case].tolerance * float(max(each.abs().max() for each in expected.values()))
            torch.testing.assert_close(torch.as_tensor(own[name]), gradient, rtol=CASES[case].tolerance, atol=near, msg=name)
        for name, value in state.items():
            torch.testing.assert_close(torch.as_tensor(own_state[name]), value, rtol=1e-9, atol=1e-12)


@EVERY
def test_it_learns_a_handful_of_images(case: str):
    task = build(case, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=3e-3)
    shown, losses = batch(task), []
    for _ in range(25):
        loss, _ = task(shown, CLOCK)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02 * abs(losses[0])


@EVERY
def test_bf16_is_near_fp32(case: str):
    task = build(case, dtype=torch.float32).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow, _ = task(batch(task), CLOCK)
    wide, _ = build(case, dtype=torch.float32).train()(batch(task), CLOCK)
    assert narrow.dtype == torch.float32
    assert float(narrow) == pytest.approx(float(wide), rel=0.05)


@EVERY
def test_a_saved_task_goes_on_bit_for_bit(case: str):
    """All that a step changes is in the state."""

    def steps(task, numbers):
        for number in numbers:
            clock = type(CLOCK)(number, CLOCK.total, 0, CLOCK.seed)
            task.zero_grad()
            loss, _ = task(batch(task), clock)
            loss.backward()
            with torch.no_grad():
                for name, p in task.named_parameters():
                    if p.requires_grad:
                        p -= 0.1 * gradients(task)[name]
            task.after_step(clock)
        return loss

    task, again = build(case).train(), build(case).train()
    steps(task, range(2))
    again.load_state_dict(task.state_dict(), strict=True)
    assert torch.equal(steps(task, range(2, 4)), steps(again, range(2, 4)))


@EVERY
def test_evaluation_waits_for_nobody_and_changes_nothing(case: str):
    task = build(case).eval()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    with torch.no_grad():
        loss, _ = task(batch(task, slice(0, 3)), CLOCK)
    assert torch.isfinite(loss)
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


@EVERY
def test_health_is_measured_without_a_step(case: str):
    task = build(case, dtype=torch.float32).eval()
    with torch.no_grad():
        _, found = task(batch(task), CLOCK, phase="health")
    assert all(torch.isfinite(value) and value.ndim == 0 for value in found.values())
    assert all(found[f"{name}/token_gradient"] > 0 for name in CASES[case].objectives)
    assert ("teacher_distance" in found) == (task.teacher is not None)
    assert all(parameter.grad is None for parameter in task.parameters())
