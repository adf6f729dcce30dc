"""An objective: one method of self-supervision as a module that asks for views and gives a loss.

A method whose samples have nothing to do with each other writes ``forward``. One that compares samples writes three parts
instead: ``embed`` (the student's work on a micro-batch), ``targets`` (the teacher's) and ``compare`` (the loss of the whole
batch, from what these gave). So a step can be accumulated exactly: embed all micro-batches, compare once, and carry the
gradients back through each (Gao et al. 2021, GradCache).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

from vitssl import dist
from vitssl.config import Section, Time
from vitssl.models.encoder import Encoder
from vitssl.models.spec import EncoderSpec
from vitssl.models.twin import Twin
from vitssl.plan import Stack
from vitssl.schedule import Clock, Duration, Schedule
from vitssl.sections import Strength
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


class WeightConfig(Section):
    """A number that multiplies an objective's loss, constant or along the run: ``weight: 0.5`` is its ``peak`` alone."""

    peak: Strength = Field(1.0, description="the weight, after a warm-up")
    start: Strength = Field(0.0, description="the weight that a linear warm-up begins with")
    warmup: Time = Field(Duration(0, "steps"), description="from start to peak, as 10% or steps")
    final: Strength | None = Field(None, description="the weight at the end; null: it stays at peak")
    shape: Literal["cosine", "linear"] = Field("cosine", description="of the way from peak to final")

    @model_validator(mode="after")
    def _nothing_is_passed_over(self) -> "WeightConfig":
        if self.warmup.unit == "ep":
            raise ValueError(f"is a share of the run (10%) or steps, and warmup={self.warmup} counts epochs")
        if self.start and not self.warmup.value:
            raise ValueError(f"start={self.start:g} is for a warm-up, and warmup is 0; give it, as warmup=10%")
        if self.final is None and "shape" in self.model_fields_set:
            raise ValueError("shape is of the way to final, which is not given; give it, or leave shape out")
        return self

    def at(self, clock: Clock) -> float:
        """The weight at a moment of the run."""
        kind, end = ("constant", self.peak) if self.final is None else (self.shape, self.final)
        warmup = self.warmup.steps(per_epoch=1, total=clock.total)
        return Schedule(self.peak, start=self.start, final=end, warmup=warmup, total=clock.total, shape=kind).at(clock.step)


def _peak(value: Any) -> Any:
    return {"peak": value} if not isinstance(value, Mapping | WeightConfig) else value


class Objective(nn.Module):
    """Subclasses say what they need and compute a loss; they own whatever exists for this method only (decoder, heads, tokens).

    ``momentum``: of the average of the encoder that the run then keeps as a teacher, along the run; None: it needs none.
    ``hides``: it hides patches from the encoder, which must then not have seen them in their neighbours.
    ``taught``: a frozen ``Teacher`` that its config names is its third argument.
    ``couples_samples``: the loss compares samples with each other, so all that are to meet in it must be there at once.
    """

    class Config(Section):
        """Every key of the method; ``weight`` multiplies its loss in the mixture."""

        weight: Annotated[WeightConfig, BeforeValidator(_peak)] = WeightConfig()

    name: ClassVar[str]  # by which a config asks for it: that of its file
    momentum: ClassVar[Schedule | None] = None
    taught: ClassVar[bool] = False
    judges_teacher: ClassVar[bool] = False  # whether its paper probes and publishes the teacher
    hides: ClassVar[bool] = False
    couples_samples: bool = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.name = cls.__module__.rpartition(".")[2]

    def __init__(self, config: Config, spec: EncoderSpec) -> None:
        super().__init__()
        self.config = config
        self.spec = spec

    def weight(self, clock: Clock) -> float:
        """What multiplies its loss; in evaluation the peak, so that a run's losses on the same images can be compared."""
        return self.config.weight.at(clock) if self.training else self.config.weight.peak

    def check_batch(self, num: int) -> None:
        """Raise ConfigError where ``num`` images, the global batch, cannot meet in its loss."""

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
        return own * dist.world() + dist.rank() if self.training else own

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes; in evaluation its own."""
        return dist.total(values) if self.training else values

    def after_step(self, clock: Clock, momentum: float) -> None:
        """After an optimiser step: by default the averages of its own heads follow them with the teacher's momentum."""
        for part in self.modules():
            if isinstance(part, Twin):
                part.update(momentum)

    def companions(self) -> list[nn.Module]:
        """Networks that it uses and neither trains nor saves (see ``Task.companions``)."""
        return []

    def stacks(self) -> list[Stack]:
        """The transformer stacks one sample passes through; by default the encoder, with all tokens."""
        return [Stack(self.spec.prefix + self.spec.num_patches, self.spec.dim, self.spec.depth, self.spec.heads)]

    def param_rules(self) -> list[Rule]:
        """Rules for this objective's own parameters (names relative to it), each covered once; none: the usual pair."""
        return []
