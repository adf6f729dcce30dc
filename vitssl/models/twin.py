"""A module's twin: the exponential moving average of its weights (Polyak and Juditsky 1992; Tarvainen and Valpola 2017).

Fine-tuning judges it in the student's place (DeiT's EMA); self-distillation takes it as the teacher. The average stays fp32
under every precision, because at a momentum of 0.9996 one in bf16 no longer moves.
"""

import copy

import torch
from torch import nn


class Twin(nn.Module):
    """``average``: a copy of ``student`` without gradient and always in evaluation mode, which follows it.

    The average is part of the state (``average.*``), so of every checkpoint; the student is not: its owner holds it.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.average = copy.deepcopy(student).float().requires_grad_(False).eval()
        self._student = (student,)  # a tuple hides it from torch, which would count and save it twice

    def train(self, mode: bool = True) -> "Twin":
        """An average has no dropout and no drop path, whatever its owner does."""
        return super().train(False)

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """average <- momentum x average + (1 - momentum) x student, after a step. Buffers are copied."""
        (student,) = self._student
        averages, news = list(self.average.parameters()), [parameter.float() for parameter in student.parameters()]
        torch._foreach_lerp_(averages, news, 1 - momentum)
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
