"""The encoder waits: at the beginning of a continued pretraining fresh heads warm up while it keeps the weights it was given.

While it waits its gradients are made zero before anybody adds them up, its groups have neither rate nor decay, and AdamW's
count of its updates stays at 0. So its parameters keep every bit, its moments are those of an optimiser that never stepped,
clipping sees the heads alone, and its first own step is corrected as a first step is: moments gathered meanwhile would be of
gradients through heads that had learned nothing. That is the same under every engine, because each still gets a gradient for
every parameter (DDP waits for them; DeepSpeed's partitions step whole groups), so these steps take as long as others. When it
is released the encoder follows the run's schedule from where that then stands.
"""

import torch
from torch import Tensor

from vitssl.task import Task
from vitssl.train.optim import set_rates


class Waiting:
    """What waits in a task (``names``), for how many ``steps`` from the run's first, and whether it does now (``held``)."""

    def __init__(self, task: Task, steps: int) -> None:
        self.steps, self.held = steps, False
        parameters = {name: p for name, p in task.named_parameters() if name.startswith("encoder.") and p.requires_grad}
        self.names = frozenset(parameters) if steps else frozenset()
        for name in self.names:
            parameters[name].register_hook(self._gradient)

    def begin_step(self, step: int, optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float) -> None:
        """Before the gradients of ``step`` (from 0): hold or release, and give the groups their rate and decay."""
        self.held = step < self.steps
        set_rates(optimizer, lr=lr, weight_decay=weight_decay, waiting=self.held)

    def end_step(self, optimizer: torch.optim.Optimizer) -> None:
        """After an update by torch's ``optimizer``: one that held the encoder does not count."""
        for group in optimizer.param_groups if self.held else ():
            for parameter in group["params"] if group["waits"] else ():
                state = optimizer.state[parameter]
                if "step" in state:
                    state["step"].zero_()

    def _gradient(self, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient) if self.held else gradient
