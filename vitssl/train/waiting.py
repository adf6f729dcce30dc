"""Parameters that wait: for the first steps of a run they keep the values they were given, while others learn.

Fresh heads on a given encoder warm up alone; DINO's last layer stands still for an epoch. While a rule waits, the gradients
of its parameters are made zero before anybody adds them up, its group has neither rate nor decay, and AdamW's count of its
updates stays at 0. So its parameters keep every bit, its moments are those of an optimiser that never stepped, clipping sees
the others alone, and its first own step is corrected as a first step is: moments gathered meanwhile would be of gradients
through heads that had learned nothing. That is the same under every engine, because each still gets a gradient for every
parameter (DDP waits for them; DeepSpeed's partitions step whole groups), so these steps take as long as others. A rule that is
released follows the run's schedule from where that then stands.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vitssl.train.optim import set_rates


class Waiting:
    """Holds the groups of an ``optimizer``, which no engine has wrapped yet, for the steps that each ``waits`` at first."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.step = 0
        for group in optimizer.param_groups:
            for parameter in group["params"] if group["waits"] else ():
                parameter.register_hook(self._holding(group["waits"]))

    def begin_step(self, step: int, optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float) -> None:
        """Before the gradients of ``step`` (from 0): hold or release, and give the groups their rate and decay."""
        self.step = step
        set_rates(optimizer, lr=lr, weight_decay=weight_decay, step=step)

    def end_step(self, optimizer: torch.optim.Optimizer) -> None:
        """After an update by torch's ``optimizer``: those that held a group do not count in it."""
        for group in optimizer.param_groups:
            for parameter in group["params"] if self.step < group["waits"] else ():
                state = optimizer.state[parameter]
                if "step" in state:
                    state["step"].zero_()

    def _holding(self, steps: int) -> Callable[[Tensor], Tensor]:
        return lambda gradient: torch.zeros_like(gradient) if self.step < steps else gradient
