"""DINO: what the encoder's average says of a large crop, the encoder shall say of every other crop (Caron et al. 2021).

The surprising decision: nothing but a sharp and centred teacher keeps it from collapse. The centre is that of the steps before
(or Sinkhorn's, of this batch), over all processes.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field, NonNegativeFloat
from torch import Tensor

from vitssl.config import Count, Section, Time
from vitssl.errors import ConfigError
from vitssl.losses.clusters import koleo, pair_cross_entropy, sinkhorn_centre
from vitssl.models.encoder import Tokens
from vitssl.models.prototypes import Centre, PrototypeHead
from vitssl.models.spec import EncoderSpec
from vitssl.models.twin import Twin
from vitssl.objectives.base import Nets, Objective
from vitssl.objectives.crops import LARGE, MultiCropConfig, by_sample, joined
from vitssl.plan import Stack
from vitssl.schedule import Clock, Duration, Schedule
from vitssl.sections import Beta, Positive
from vitssl.task import Draw, Embeddings, Rule, decay_rules
from vitssl.views import View


def _of_the_run(value: Duration) -> Duration:
    if value.unit == "ep":
        raise ValueError("an objective does not know how long an epoch is; write a share of the run, as 10%, or steps")
    return value


class TemperatureConfig(Section):
    """The teacher's, along a straight line to its peak and constant from there."""

    start: Positive = Field(0.04, description="at the first step")
    peak: Positive = Field(0.04, description="after the warm-up (official code: .07 where training is stable)")
    warmup: Annotated[Time, AfterValidator(_of_the_run)] = Field(
        Duration(0, "steps"), description="share of the run, as 10%, or steps"
    )

    def at(self, clock: Clock) -> float:
        warmup = self.warmup.steps(per_epoch=0, total=clock.total)
        return Schedule(self.peak, start=self.start, warmup=warmup, shape="constant").at(clock.step)


class HeadConfig(Section):
    """Caron et al. 2021, appendix C, with the official code's defaults."""

    prototypes: Count = Field(65_536, description="outputs (iBOT: 8,192)")
    hidden: Count = Field(2048, description="width of the MLP's hidden layers")
    bottleneck: Count = Field(256, description="width before the last layer")
    layers: Count = Field(3, description="of the MLP")
    fixed_norm: bool = Field(True, description="prototypes of length 1 (norm_last_layer), or of a length that is learned")

    def build(self, dim: int) -> PrototypeHead:
        return PrototypeHead(dim, **self.model_dump())


class DINO(Objective):
    """Cross entropy of class tokens over pairs of crops; with ``koleo`` they also keep away from each other.

    Metrics beside the losses: ``entropy`` of a teacher's choice as a share of ln P (0: it always takes one prototype, 1: it
    never chooses), and ``usage``, how many prototypes its choices for the images that a
    process compares at once are spread over.
    """

    class Config(Objective.Config):
        head: HeadConfig = HeadConfig()
        freeze_last_layer: Time = Field(
            Duration(1, "ep"),
            description="while the prototypes stand still at the beginning: epochs, a share of the run, or steps",
        )
        temperature: Positive = Field(0.1, description="of the student's logits")
        teacher_temperature: TemperatureConfig = TemperatureConfig()
        centring: Literal["mean", "sinkhorn"] = Field("mean", description="of the steps before, or Sinkhorn's, of each batch")
        centre_momentum: Beta | None = Field(None, description="of the mean along the steps; null: 0.9 (official code)")
        koleo: NonNegativeFloat = Field(0.0, description="weight of the distance between images' class tokens (DINOv2: 0.1)")
        koleo_group: int | None = Field(None, ge=2, description="images that look at each other; null: the whole batch")
        crops: MultiCropConfig = MultiCropConfig()

    momentum = Schedule(0.996, final=1.0)
    judges_teacher = True

    def __init__(self, config: Config, spec: EncoderSpec) -> None:
        super().__init__(config, spec)
        spec.require_class_token(f"objectives.{self.name}")
        self.crops = config.crops.views(spec)
        self._stacks = config.crops.stacks(spec, where=f"objectives.{self.name}.crops")
        self.couples_samples = config.centring == "sinkhorn" or config.koleo > 0
        self._refuse_unused("koleo_group", unless=config.koleo > 0, why="koleo is 0")
        self._refuse_unused("centre_momentum", unless=config.centring == "mean", why="centring=sinkhorn keeps no mean")
        self.head = config.head.build(spec.dim)
        self.teacher_head = Twin(self.head)
        self.centre = self._new_centre(config.head)

    def views(self) -> dict[str, View]:
        return self.crops

    def embed(self, nets: Nets, views: dict[str, Tensor], draw: Draw) -> Embeddings:
        """``crops`` [B, V, E]: rows before the prototypes, large crops first; with koleo ``tokens`` [B, 2, D]: class tokens."""
        return self._embedded(nets.student.together(self.config.crops.joined(views)))

    def targets(self, nets: Nets, views: dict[str, Tensor], draw: Draw) -> Embeddings:
        """``teacher`` [B, 2, E]: the teacher's rows of the large crops."""
        return {"teacher": by_sample(self.teacher_head(nets.teacher(joined(views, LARGE)).cls), 2)}

    def compare(self, embeddings: Embeddings, targets: Embeddings, clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        crops, teacher, warmth = embeddings["crops"], targets["teacher"], self._warmth(self.config.teacher_temperature, clock)
        prototypes = self.head.last_layer(), self.teacher_head.average.last_layer()
        centre = self._centre(self.centre, teacher.flatten(0, 1), prototypes[1], warmth)
        options = {"temperature": self.config.temperature, "teacher_temperature": warmth}
        loss, entropy, chosen = pair_cross_entropy(crops, teacher, *prototypes, centre, **options)
        metrics = {"loss": loss.detach(), "entropy": entropy / math.log(len(chosen))}
        metrics["usage"] = torch.exp(-torch.xlogy(chosen, chosen).sum())
        if self.config.koleo:
            spread = self._spread(embeddings["tokens"])
            loss, metrics["koleo"] = loss + self.config.koleo * spread, spread.detach()
            metrics["loss"] = loss.detach()
        return loss, metrics

    def after_step(self, clock: Clock, momentum: float) -> None:
        super().after_step(clock, momentum)
        for part in self.modules():
            if isinstance(part, Centre):
                part.follow()

    def check_batch(self, num: int) -> None:
        if (group := self.config.koleo_group) and num % group:
            raise ConfigError(
                f"objectives.{self.name}.koleo_group={group} does not divide a batch of {num} images; take a divisor"
            )

    def stacks(self) -> list[Stack]:
        return self._stacks

    def param_rules(self) -> list[Rule]:
        if not self.config.freeze_last_layer.value:
            return []
        last = r"(?:patch_)?head\.last_layer\..*"  # both of its tensors are matrices
        return [*decay_rules(rf"(?!{last}).*"), Rule("last_layer", last, waits=self.config.freeze_last_layer)]

    def _warmth(self, temperature: TemperatureConfig, clock: Clock) -> float:
        """The teacher's temperature; in evaluation its peak, so that losses on the same images can be compared."""
        return temperature.at(clock) if self.training else temperature.peak

    def _embedded(self, tokens: Sequence[Tokens]) -> Embeddings:
        """``tokens`` of the large crops, and of the small ones where there are any."""
        nums = len(LARGE), self.config.crops.num_local
        rows = [by_sample(self.head(each.cls), num) for each, num in zip(tokens, nums, strict=False)]
        found = {"crops": torch.cat(rows, dim=1)}  # [B, V, E]
        return found | ({"tokens": by_sample(tokens[0].cls, len(LARGE))} if self.config.koleo else {})

    def _refuse_unused(self, key: str, *, unless: bool, why: str) -> None:
        """Raise ConfigError for a key that was given and that no other setting lets matter."""
        if not unless and getattr(self.config, key) is not None:
            raise ConfigError(
                f"objectives.{self.name}.{key}={getattr(self.config, key)} would change nothing: {why}; leave it out"
            )

    def _new_centre(self, head: HeadConfig) -> Centre | None:
        given = self.config.centre_momentum
        return None if self.config.centring == "sinkhorn" else Centre(head.prototypes, momentum=0.9 if given is None else given)

    def _centre(
        self, centre: Centre | None, rows: Tensor, prototypes: Tensor, temperature: float, *, shown: Tensor | None = None
    ) -> Tensor:
        """[P] for the assignments of teacher's rows [R, E]; a mean is taken of what is ``shown`` (None: of these rows)."""
        with torch.no_grad():
            if centre is None:
                return sinkhorn_centre(rows, prototypes, temperature=temperature, gather=self.all_rows)
            if self.training:
                centre.see(rows if shown is None else shown, prototypes)
            return centre.centre

    def _spread(self, tokens: Tensor) -> Tensor:
        """KoLeo of [B, 2, D] class tokens before the head, each crop by itself, summed (DINOv2's official code)."""
        own, group = self.own_rows(tokens), self.config.koleo_group
        everybody = self.all_rows(tokens)
        return sum(koleo(tokens[:, crop], everybody[:, crop], own, group=group) for crop in range(tokens.shape[1]))
