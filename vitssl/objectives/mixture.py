"""A run: a weighted mixture of objectives over one encoder. A single method is a mixture of one."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vitssl.data.augment import Normalize, seen
from vitssl.draws import uniform
from vitssl.errors import ConfigError
from vitssl.models.encoder import Encoder, Pooling
from vitssl.objectives.base import Nets, Objective
from vitssl.plan import Stack
from vitssl.schedule import Clock
from vitssl.task import Batch, Draw, Rule, Task, decay_rules
from vitssl.views import View, purpose


class Mixture(Task):
    """The pretraining task: encoder, objectives by name, and a teacher where one is needed.

    ``mean`` and ``std``: per channel, in units of [0, 1]. Raises ConfigError for a teacher that is needed and not given, or
    statistics that do not fit the encoder's channels.
    """

    def __init__(
        self,
        encoder: Encoder,
        objectives: Mapping[str, Objective],
        teacher: Encoder | None = None,
        *,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        if not objectives:
            raise ConfigError("objectives: a run needs at least one, as in objectives.mae={}")
        if teacher is None and (asking := [name for name, objective in objectives.items() if objective.needs_teacher]):
            raise ConfigError(f"objectives.{asking[0]} needs a teacher and this run keeps none")
        self.couples_samples = any(objective.couples_samples for objective in objectives.values())
        self.encoder = encoder
        self.teacher = teacher
        self.objectives = nn.ModuleDict(objectives)
        if (channels := encoder.spec.channels) != 3 and any(view.photometric.changes for view in self.views):
            raise ConfigError(f"photometric: changes the colours of 3 channels, and encoder.channels={channels}; leave it out")
        self.normalize = Normalize(mean, std, channels=encoder.spec.channels)

    @property
    def views(self) -> set[View]:
        """What the data engine must deliver: the union of what the objectives ask for."""
        return {view for objective in self.objectives.values() for view in objective.views().values()}

    def forward(self, batch: Batch, clock: Clock, *, features: Pooling | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """(sum of weight x loss, metrics called ``<objective>/<metric>``). Equal views are normalised once and shared."""
        if features:
            return self.encoder(self._only_view(batch)).pool(features), {}
        images = {view: seen(batch, view, self.normalize, seed=clock.seed) for view in self.views}
        nets = Nets(student=self.encoder, teacher=self.teacher)
        total, metrics = torch.zeros((), device=batch.positions.device), {}
        for name, objective in self.objectives.items():
            views = {role: images[view] for role, view in objective.views().items()}
            loss, own = objective(nets, views, clock, self.draw(name, batch, clock))
            total = total + objective.config.weight * loss
            metrics |= {f"{name}/{metric}": value for metric, value in own.items()}
        return total, metrics

    def pictures(self, batch: Batch, clock: Clock) -> Tensor | None:
        """[B, columns, C, H, W] in [0, 1]: what the first objective that can reconstruct makes of the batch, else None."""
        for name, objective in self.objectives.items():
            if hasattr(objective, "reconstruct"):
                images = seen(batch, objective.views()["image"], self.normalize, seed=clock.seed)
                with torch.no_grad():
                    columns = objective.reconstruct(Nets(self.encoder, self.teacher), images, self.draw(name, batch, clock))
                return self.normalize.restore(torch.stack(columns, dim=1))
        return None

    def stacks(self) -> list[Stack]:
        return [stack for objective in self.objectives.values() for stack in objective.stacks()]

    @staticmethod
    def draw(objective: str, batch: Batch, clock: Clock) -> Draw:
        """The random numbers of an objective for this batch: a function of seed, ``<objective>.<name>`` and global position."""
        return lambda name, num: uniform(clock.seed, purpose(f"{objective}.{name}"), batch.positions, num)

    def _only_view(self, batch: Batch) -> Tensor:
        (images,) = batch.views.values()
        return self.normalize(images)

    def param_rules(self) -> list[Rule]:
        """The usual pair for everything but the objectives that bring rules for their own parameters."""
        own = {name: objective.param_rules() for name, objective in self.objectives.items()}
        taken = [name for name, rules in own.items() if rules]
        others = "".join(rf"(?!objectives\.{re.escape(name)}\.)" for name in taken) + ".*"
        return decay_rules(others) + [
            Rule(f"{name}.{rule.name}", rf"objectives\.{re.escape(name)}\.(?:{rule.pattern})",
                 rule.lr_scale, rule.weight_decay, rule.vectors)
            for name in taken for rule in own[name]
        ]  # fmt: skip
