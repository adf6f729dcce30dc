"""An objective: one method of self-supervision as a module that asks for views and gives a loss."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from vitssl.config import Section
from vitssl.models.encoder import Encoder, EncoderSpec
from vitssl.plan import Stack
from vitssl.schedule import Clock
from vitssl.task import Draw, Rule
from vitssl.views import View


@dataclass(frozen=True)
class Nets:
    """The networks of a run, shared by all of its objectives."""

    student: Encoder
    teacher: Encoder | None = None


class Objective(nn.Module):
    """Subclasses say what they need and compute a loss; they own whatever exists for this method only (decoder, heads, tokens).

    ``needs_teacher``: the run keeps an average of the encoder. ``couples_samples``: the loss compares samples with each other,
    so the batch that meets in it matters and accumulation does not enlarge it.
    """

    class Config(Section):
        """Every key of the method; ``weight`` multiplies its loss in the mixture."""

        weight: float = 1.0

    needs_teacher: ClassVar[bool] = False
    couples_samples: ClassVar[bool] = False

    def __init__(self, config: Config, spec: EncoderSpec) -> None:
        super().__init__()
        self.config = config
        self.spec = spec

    def views(self) -> dict[str, View]:
        """The views it wants, by the names under which ``forward`` receives them. Equal views of objectives are one tensor."""
        raise NotImplementedError

    def forward(self, nets: Nets, views: dict[str, Tensor], clock: Clock, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """views: normalised [B, C, H, W] each; draw: this batch's random numbers -> (scalar loss, detached scalar metrics)."""
        raise NotImplementedError

    def stacks(self) -> list[Stack]:
        """The transformer stacks one sample passes through; by default the encoder, with all tokens."""
        return [Stack(self.spec.prefix + self.spec.num_patches, self.spec.dim, self.spec.depth, self.spec.heads)]

    def param_rules(self) -> list[Rule]:
        """Rules for this objective's own parameters (names relative to it), each covered once; none: the usual pair."""
        return []
