"""A module's twin: the exponential moving average of its weights (Polyak and Juditsky 1992; Tarvainen and Valpola 2017).

Fine-tuning judges it in the student's place (DeiT's EMA); self-distillation takes it as the teacher. The average stays fp32
under every precision, because at a momentum of 0.9996 one in bf16 no longer moves.
"""

import copy
from typing import Any

import torch
from torch import nn


class Twin(nn.Module):
    """``average``: a copy of ``student`` without gradient, always in evaluation mode, which follows it.

    With ``trains`` it is in training mode when its owner is, and its buffers are its own: MoCo v3's keys go through BatchNorms
    that see their own batches. The average is part of the state (``average.*``), so of every checkpoint; the student is not:
    its owner holds it.
    """

    def __init__(self, student: nn.Module, *, trains: bool = False) -> None:
        super().__init__()
        self.average = copy.deepcopy(student).to(dtype=_wide(student)).requires_grad_(False).train(trains)
        self.trains = trains
        self._student = (student,)  # a tuple hides it from torch, which would count and save it twice

    def train(self, mode: bool = True) -> "Twin":
        """An average has no dropout and no drop path, whatever its owner does, unless it ``trains``."""
        return super().train(mode and self.trains)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The average's answer, without gradient."""
        with torch.no_grad():
            return self.average(*inputs, **options)

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """average <- momentum x average + (1 - momentum) x student, after a step. Buffers are copied."""
        (student,) = self._student
        averages = list(self.average.parameters())
        news = [parameter.to(own.dtype) for own, parameter in zip(averages, student.parameters(), strict=True)]
        torch._foreach_lerp_(averages, news, 1 - momentum)
        if not self.trains:
            self._copy_buffers()

    @torch.no_grad()
    def restart(self) -> None:
        """Make the average equal to the student, once that has been given the weights it begins with."""
        (student,) = self._student
        for own, new in zip(self.average.parameters(), student.parameters(), strict=True):
            own.copy_(new)
        self._copy_buffers()

    def _copy_buffers(self) -> None:
        (student,) = self._student
        for own, new in zip(self.average.buffers(), student.buffers(), strict=True):
            own.copy_(new)


def _wide(module: nn.Module) -> torch.dtype:
    """fp32, or what is wider."""
    kinds = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    return torch.float64 if torch.float64 in kinds else torch.float32
