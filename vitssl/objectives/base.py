"""An objective: one method of self-supervision as a module that asks for views and gives a loss.

A method whose samples have nothing to do with each other writes ``forward``. One that compares samples writes three parts
instead: ``embed`` (the student's work on a micro-batch), ``targets`` (the teacher's) and ``compare`` (the loss of the whole
batch, from what these gave). So a step can be accumulated exactly: embed all micro-batches, compare once, and carry the
gradients back through each (Gao et al. 2021, GradCache).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vitssl import dist
from vitssl.config import Section
from vitssl.models.encoder import Encoder, EncoderSpec
from vitssl.models.twin import Twin
from vitssl.plan import Stack
from vitssl.schedule import Clock, Schedule
from vitssl.task import Draw, Embeddings, Rule
from vitssl.views import View


@dataclass(frozen=True)
class Nets:
    """The networks of a run, shared by all of its objectives, and what their images were before they were normalised.

    Called, the teacher answers as its average, without gradient.
    """

    student: Encoder
    teacher: Twin | None = None
    restore: Callable[[Tensor], Tensor] = lambda images: images  # normalised [B, C, H, W] -> pixels in [0, 1]


class Objective(nn.Module):
    """Subclasses say what they need and compute a loss; they own whatever exists for this method only (decoder, heads, tokens).

    ``momentum``: of the average of the encoder that the run then keeps as a teacher, along the run; None: it needs none.
    ``couples_samples``: the loss compares samples with each other, so all that are to meet in it must be there at once.
    """

    class Config(Section):
        """Every key of the method; ``weight`` multiplies its loss in the mixture."""

        weight: float = 1.0

    momentum: ClassVar[Schedule | None] = None
    judges_teacher: ClassVar[bool] = False  # whether its paper probes and publishes the teacher
    couples_samples: bool = False

    def __init__(self, config: Config, spec: EncoderSpec) -> None:
        super().__init__()
        self.config = config
        self.spec = spec

    def views(self) -> dict[str, View]:
        """The views it wants, by the names under which ``forward`` receives them. Equal views of objectives are one tensor."""
        raise NotImplementedError

    def forward(self, nets: Nets, views: dict[str, Tensor], clock: Clock, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """views: normalised [B, C, H, W] each; draw: this batch's random numbers -> (scalar loss, detached scalar metrics)."""
        given = self.embed(nets, views, draw), self.targets(nets, views, draw)
        return self.compare(*given, clock)

    def embed(self, nets: Nets, views: dict[str, Tensor], draw: Draw) -> Embeddings:
        """What the student makes of a micro-batch, by name, each [rows, ...]; these are joined along their rows."""
        raise NotImplementedError

    def targets(self, nets: Nets, views: dict[str, Tensor], draw: Draw) -> Embeddings:
        """What stands beside it without gradient: the teacher's answers, numbers of the draw; joined likewise."""
        return {}

    def compare(self, embeddings: Embeddings, targets: Embeddings, clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of this process's rows of the batch; the batch's is the mean over processes (see ``dist.total``)."""
        raise NotImplementedError

    def all_rows(self, rows: Tensor) -> Tensor:
        """Those of all processes, in the order of the batch; in evaluation its own, since shares may then differ."""
        return dist.all_rows(rows) if self.training else rows

    def own_rows(self, rows: Tensor) -> Tensor:
        """[B_p] int64: where this process's rows stand among :meth:`all_rows`."""
        own = torch.arange(len(rows), device=rows.device)
        return dist.own_rows(len(rows), device=rows.device) if self.training else own

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes; in evaluation its own."""
        return dist.total(values) if self.training else values

    def after_step(self, clock: Clock, momentum: float) -> None:
        """After an optimiser step: by default the averages of its own heads follow them with the teacher's momentum."""
        for part in self.modules():
            if isinstance(part, Twin):
                part.update(momentum)

    def stacks(self) -> list[Stack]:
        """The transformer stacks one sample passes through; by default the encoder, with all tokens."""
        return [Stack(self.spec.prefix + self.spec.num_patches, self.spec.dim, self.spec.depth, self.spec.heads)]

    def param_rules(self) -> list[Rule]:
        """Rules for this objective's own parameters (names relative to it), each covered once; none: the usual pair."""
        return []
