"""What trains: the one contract between a method and the loop, and the batch that passes between them."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vitssl.plan import Stack
from vitssl.schedule import Clock, Duration
from vitssl.views import View


class Draw(Protocol):
    """The random numbers of this batch's samples, whoever holds them."""

    def __call__(self, name: str, num: int, *, host: bool = False) -> Tensor:
        """[B, num] uniform in [0, 1), float64; with ``host`` on the CPU, where counting what comes of them waits for no GPU."""


Embeddings = dict[str, Tensor]
"""What a loss compares, by name, each [rows, ...]."""

Phase = Literal["embed", "compare", "carry", "health"]


class Bad(NamedTuple):
    """A sample that could not be used: where it stood, its key, that of the one served in its place, and why."""

    position: int
    key: str
    served: str
    reason: str
    known: bool = False  # a quarantine file named it
    passing: bool = False  # the network or the moment decided it, not the bytes
    choice: int = 0  # which of the samples drawn to stand in for it was the first that could
    sample: int = -1  # its id in the source: at the same position of another run stands another


@dataclass(frozen=True)
class Batch:
    """B samples as the data engine delivers them: uint8 views, global positions, labels where the source has them."""

    views: dict[View, Tensor]  # each [B, C, height, width] uint8
    positions: Tensor  # [B] int64, global positions of the run
    labels: Tensor | None = None  # [B] int64, or [B, classes] bool where samples have several
    keys: tuple[str, ...] = ()  # of the samples that stand at the positions, also where another was served
    bad: tuple[Bad, ...] = ()
    host: Tensor | None = None  # the positions on the CPU, where a batch is on a device

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on ``device``; copies from pinned memory are asynchronous."""
        return replace(
            self,
            views={view: images.to(device, non_blocking=True) for view, images in self.views.items()},
            positions=self.positions.to(device, non_blocking=True),
            host=self.positions if self.host is None else self.host,
            labels=None if self.labels is None else self.labels.to(device, non_blocking=True),
        )

    def pin_memory(self) -> "Batch":
        """Called by torch's DataLoader."""
        return replace(
            self,
            views={view: images.pin_memory() for view, images in self.views.items()},
            positions=self.positions.pin_memory(),
            labels=None if self.labels is None else self.labels.pin_memory(),
        )


@dataclass(frozen=True)
class Rule:
    """How some parameters are optimised: by name, and by whether they are vectors (1-D, or a ``.bias``).

    Every trainable parameter of a task is covered by exactly one rule; the machine refuses anything else.
    """

    name: str  # unique within the task, shown in the plan
    pattern: str  # a regular expression for the whole parameter name
    lr_scale: float = 1.0  # times the run's learning rate
    weight_decay: float = 1.0  # times the run's weight decay
    vectors: bool | None = None  # True: vectors only; False: all others only; None: both
    waits: Duration | None = None  # from the run's first step, while its parameters keep their values; None: not at all


def decay_rules(pattern: str = ".*", *, prefix: str = "", lr_scale: float = 1.0, waits: Duration | None = None) -> list[Rule]:
    """The field's usual pair for the parameters of a pattern: matrices decay, vectors do not."""
    return [
        Rule(f"{prefix}decay", pattern, lr_scale=lr_scale, weight_decay=1.0, vectors=False, waits=waits),
        Rule(f"{prefix}no_decay", pattern, lr_scale=lr_scale, weight_decay=0.0, vectors=True, waits=waits),
    ]


class Task(nn.Module):
    """Everything that trains. The whole module is what the engine wraps; nothing is called past the wrapper."""

    couples_samples: bool = False  # whether the loss compares samples, so that the batch that meets in it matters

    def forward(
        self,
        batch: Batch | None,
        clock: Clock,
        *,
        features: str | None = None,
        phase: Phase | None = None,
        given: Embeddings | None = None,
    ) -> tuple[Tensor | Embeddings, dict[str, Tensor]]:
        """(scalar loss, detached scalar metrics), each the mean over the batch's samples.

        With ``features`` (a pooling): ([B, D] frozen features, {}) of the batch's only view, which is how probes look through
        the wrapper. A task that couples samples is accumulated in phases, each of them a forward of its own:

        * ``embed``, without gradient, of each micro-batch: (embeddings, {});
        * ``compare`` of all of them joined (``given``, leaves; ``batch`` None): (loss of the coupled part, its metrics);
        * ``carry`` of each micro-batch again, with the gradients of its embeddings (``given``): (loss of the uncoupled part
          / micro-batches + the sum of embeddings x gradients, its metrics), under the same random numbers.

        ``health``, in evaluation: (nothing to train on, numbers that tell whether the networks are well).
        """
        raise NotImplementedError

    def after_step(self, clock: Clock) -> None:
        """Called once after every optimiser step, where a method moves its teacher or its centres."""

    def check_batch(self, num: int) -> None:
        """Raise ConfigError where ``num`` images, the global batch, cannot meet in its loss."""

    def stacks(self) -> list[Stack]:
        """The transformer stacks one sample passes through, for the plan's estimate of memory."""
        raise NotImplementedError

    def companions(self) -> list[nn.Module]:
        """Networks that it uses and neither trains nor saves, such as a teacher from elsewhere; the plan counts them."""
        return []

    def param_rules(self) -> list[Rule]:
        """Which rule optimises which parameter; by default all of them under the usual pair."""
        return decay_rules()
