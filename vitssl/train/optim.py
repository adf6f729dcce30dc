"""Optimisation: parameter rules as data, each parameter covered by exactly one, and the optimiser built from them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitssl.errors import ConfigError
from vitssl.lars import LARS
from vitssl.sections import OptimConfig
from vitssl.task import Rule, Task

_BALL = ("momentum_buffer",)
MOMENTS: Mapping[str, tuple[str, ...]] = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": _BALL, "lars": _BALL}
"""What torch calls the tensors that an optimiser keeps for each parameter: the state that a checkpoint holds."""


@dataclass(frozen=True)
class Group:
    """The parameters of one rule, by name."""

    rule: Rule
    names: tuple[str, ...]
    size: int


def group_parameters(task: Task) -> list[Group]:
    """Sort every trainable parameter under the one rule that covers it, in the order of the rules.

    Raises ConfigError naming a parameter that no rule or more than one rule covers, and the rules that do; or a name
    that two rules share.
    """
    members: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    listed = task.param_rules()
    rules = {rule.name: rule for rule in listed}
    if len(rules) < len(listed):
        twice = next(rule.name for rule in listed if rules[rule.name] is not rule)
        raise ConfigError(f"two parameter rules are called {twice}; each needs a name of its own: mend param_rules")
    for name, parameter in task.named_parameters():
        if not parameter.requires_grad:
            continue
        covering = [rule.name for rule in rules.values() if covers(rule, name, parameter)]
        if len(covering) != 1:
            found = "no rule" if not covering else f"{len(covering)} rules ({', '.join(covering)})"
            raise ConfigError(f"parameter {name} is covered by {found}; each needs exactly one: mend param_rules")
        members.setdefault(covering[0], []).append(name)
        sizes[covering[0]] = sizes.get(covering[0], 0) + parameter.numel()
    return [Group(rule, tuple(members[name]), sizes[name]) for name, rule in rules.items() if name in members]


def covers(rule: Rule, name: str, parameter: nn.Parameter) -> bool:
    """Whether a rule applies to a parameter: by its name and by whether it is a vector (1-D or a bias)."""
    vector = parameter.ndim <= 1 or name.endswith(".bias")
    return bool(re.fullmatch(rule.pattern, name)) and rule.vectors in (None, vector)


def build_optimizer(
    task: Task, config: OptimConfig, *, lr: float, device: torch.device, waits: Mapping[str, int] | None = None
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) or SGD with heavy-ball momentum, fused where the device has it, or LARS.

    Each group is a ``rule`` and carries ``lr_scale``, ``decay_scale`` and the first steps in which it ``waits`` (by rule), by
    which :func:`set_rates` follows the run.
    """
    parameters = dict(task.named_parameters())
    groups = [
        {
            "params": [parameters[name] for name in group.names],
            "weight_decay": config.weight_decay * group.rule.weight_decay,
            "decay_scale": group.rule.weight_decay,
            "lr_scale": group.rule.lr_scale,
            "rule": group.rule.name,
            "waits": (waits or {}).get(group.rule.name, 0),
        }
        for group in group_parameters(task)
    ]
    fused = device.type in ("cuda", "cpu")
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, fused=fused)
    if config.name == "lars":
        return LARS(groups, lr=lr, momentum=config.momentum, trust=config.trust)
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=config.eps, fused=fused)


def clip_modules(gradients: Mapping[str, Tensor], clip: float) -> None:
    """Shrink, in place, the gradients of the encoder, and those of each head, to a joint norm of ``clip`` where it is longer,
    as DINOv2 does. By parameters' names in a task; what stands in for patches (mask tokens) counts as the encoder's.
    """
    parts: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        module = re.match(r"(objectives\.\w+\.)?(?!objectives)\w+(?=\.)", name)
        parts.setdefault(module[0] if module else "encoder", []).append(gradient)
    for own in parts.values():
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(own)))
        torch._foreach_mul_(own, (clip / (norm + 1e-6)).clamp(max=1.0))


def clip_each(gradients: Sequence[Tensor], clip: float) -> None:
    """Shrink each gradient, in place, to a norm of ``clip`` where it is longer: DINO's ``clip_gradients``."""
    norms = torch._foreach_norm(gradients)
    torch._foreach_mul_(gradients, [(clip / (norm + 1e-6)).clamp(max=1.0) for norm in norms])


def set_rates(optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float, step: int = 0) -> None:
    """Give every group its share of the scheduled learning rate and weight decay; those that wait at ``step`` get neither."""
    for group in optimizer.param_groups:
        held = step < group["waits"]
        group["lr"] = 0.0 if held else lr * group["lr_scale"]
        group["weight_decay"] = 0.0 if held else weight_decay * group["decay_scale"]
