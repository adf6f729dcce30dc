"""A task's and its optimiser's state as named fp32 tensors, gathered from and scattered to any engine.

Names are the task's own, so a run saved under one engine continues under another. Under ZeRO-1 and ZeRO-2 parameters are
replicated and the optimiser's moments live in flat partitions; DeepSpeed's public per-parameter functions put them together.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitssl.errors import CheckpointError, TrainingError
from vitssl.models.state import require_fit
from vitssl.task import Task
from vitssl.train.checkpoint import Saved
from vitssl.train.launch import Engine


def gather(engine: Engine, *, step: int, facts: dict[str, Any]) -> Saved:
    """Everything a continuation needs. Called by every process; the result is whole on each (and written by one).

    Raises TrainingError where something is not finite: the loss was still a number, and what it led to is not.
    """
    moments: dict[str, Tensor] = {}
    if engine.kind == "deepspeed":
        from deepspeed.utils import safe_get_full_optimizer_state

        for name, parameter in engine.named_parameters.items():
            for moment in engine.moments:
                moments[f"{moment}/{name}"] = safe_get_full_optimizer_state(parameter, moment)
    else:
        for name, parameter in engine.named_parameters.items():
            for moment in engine.moments:
                moments[f"{moment}/{name}"] = engine.optimizer.state[parameter][moment]
    groups = engine.torch_optimizer.param_groups
    waits = {each["rule"]: {"steps": each["waits"], "updates": _updates(engine, [each])} for each in groups if each["waits"]}
    facts = {**facts, "updates": _updates(engine, [group for group in groups if not group["waits"]])}
    facts |= {"waiting": waits} if waits else {}
    if engine.accelerator.scaler is not None:
        facts["scaler"] = engine.accelerator.scaler.state_dict()
    saved = Saved(step=step, state=engine.task.state_dict(), moments=moments, facts=facts)
    for name, tensor in {**saved.state, **saved.moments}.items():
        if not torch.isfinite(tensor).all():
            raise TrainingError(
                f"{name} is not finite after step {step}; nothing of it was saved. Lower optim.base_lr, set"
                " optim.clip=1.0 or take launch.precision=fp32, under another run.name"
            )
    return saved


def load_task(task: Task, saved: Saved, *, where: Path) -> None:
    """Put a saved state into a task, strictly, before the engine wraps it. Raises CheckpointError with a table of keys."""
    require_fit(saved.state, task.state_dict(), model=f"the configured network (checkpoint in {where})")
    task.load_state_dict(saved.state, strict=True)


def load_optimizer(engine: Engine, saved: Saved, *, where: Path) -> None:
    """Put saved moments and the update count into a prepared engine's optimiser."""
    names = {f"{moment}/{name}" for name in engine.named_parameters for moment in engine.moments}
    if names != set(saved.moments):
        odd = sorted(names ^ set(saved.moments))
        raise CheckpointError(f"{where}: moments do not fit the trained parameters ({len(odd)} differ: {', '.join(odd[:3])})")
    groups = engine.torch_optimizer.param_groups
    waits = {group["rule"]: waited(saved, group["rule"])["updates"] for group in groups if group["waits"]}
    create_optimizer(engine, updates=saved.facts["updates"], waits=waits)
    if engine.kind == "deepspeed":
        from deepspeed.utils import safe_set_full_optimizer_state

        for name, parameter in engine.named_parameters.items():
            for moment in engine.moments:
                safe_set_full_optimizer_state(parameter, saved.moments[f"{moment}/{name}"].to(engine.device), moment)
    else:
        for name, parameter in engine.named_parameters.items():
            for moment in engine.moments:
                engine.optimizer.state[parameter][moment].copy_(saved.moments[f"{moment}/{name}"])
    if engine.accelerator.scaler is not None and "scaler" in saved.facts:
        engine.accelerator.scaler.load_state_dict(saved.facts["scaler"])


def waited(saved: Saved, rule: str) -> dict[str, int]:
    """{"steps": that a rule was to wait, "updates": it has had since}."""
    return saved.facts.get("waiting", {}).get(rule, {"steps": 0, "updates": 0})


def create_optimizer(engine: Engine, *, updates: int = 0, waits: Mapping[str, int] | None = None) -> None:
    """Zero moments, and AdamW's update count (its own for a rule that ``waits``), as the optimiser's first step makes them.

    Done at once under every engine: DeepSpeed 0.19 links moments to parameters after the first group's first step, when the
    other groups have none yet, and would never find theirs.
    """
    optimizer = engine.torch_optimizer
    counts = isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            number = float((waits or {}).get(group["rule"], 0 if group["waits"] else updates))
            count = {"step": torch.tensor(number, device=parameter.device)} if counts else {}
            optimizer.state[parameter] = count | {moment: torch.zeros_like(parameter) for moment in engine.moments}
    if engine.kind == "deepspeed":
        engine.wrapped.optimizer._lazy_init_hp_params_optimizer_state()


def _updates(engine: Engine, groups: Sequence[Mapping[str, Any]]) -> int:
    """How often AdamW has moved the parameters of groups that move together: its bias correction counts these, and skipped
    fp16 steps are none. SGD: 0."""
    return int(engine.torch_optimizer.state[groups[0]["params"][0]].get("step", 0)) if groups else 0
