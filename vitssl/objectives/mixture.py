"""A run: a weighted mixture of objectives over one encoder. A single method is a mixture of one."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitssl import dist
from vitssl.data.augment import Normalize, seen
from vitssl.draws import uniform
from vitssl.errors import ConfigError
from vitssl.models.encoder import Encoder
from vitssl.models.spec import Pooling
from vitssl.models.twin import Twin
from vitssl.objectives import health
from vitssl.objectives.base import Nets, Objective
from vitssl.objectives.layerwise import decaying, layer_decay_rules
from vitssl.plan import Stack
from vitssl.schedule import Clock, Duration, Schedule
from vitssl.sections import Decay
from vitssl.task import Batch, Draw, Embeddings, Phase, Rule, Task, decay_rules
from vitssl.views import View, purpose


class Mixture(Task):
    """The pretraining task: encoder, objectives by name, and a teacher where one is needed.

    ``momentum``: of the teacher along the run; by default what the objectives that need one say. ``waits``: how long the
    encoder keeps its weights at the beginning, while what is fresh on top of it warms up. ``layer_decay``, ``patch_lr`` and
    ``decay``: see :func:`layer_decay_rules`. ``mean`` and ``std``: per
    channel, in units of [0, 1]. Raises ConfigError where objectives disagree about their teacher, for a momentum that
    nobody needs, or statistics that do not fit the encoder's channels.
    """

    def __init__(
        self,
        encoder: Encoder,
        objectives: Mapping[str, Objective],
        *,
        momentum: Schedule | None = None,
        waits: Duration | None = None,
        layer_decay: float = 1.0,
        patch_lr: float = 1.0,
        decay: Decay = "matrices",
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        if not objectives:
            raise ConfigError("objectives: a run needs at least one, as in objectives.mae={}")
        self.couples_samples = any(objective.couples_samples for objective in objectives.values())
        self.encoder, self.waits, self.decay = encoder, waits, decay
        self.layer_decay, self.patch_lr = layer_decay, patch_lr
        self.momentum = _momentum(objectives, momentum)
        self.teacher = None if self.momentum is None else Twin(encoder)
        self.objectives = nn.ModuleDict(objectives)
        if (channels := encoder.spec.channels) != 3 and any(view.photometric.changes for view in self.views):
            raise ConfigError(f"photometric: changes the colours of 3 channels, and encoder.channels={channels}; leave it out")
        self.normalize = Normalize(mean, std, channels=encoder.spec.channels)

    @property
    def views(self) -> set[View]:
        """What the data engine must deliver: the union of what the objectives ask for."""
        return {view for objective in self.objectives.values() for view in objective.views().values()}

    @property
    def judged(self) -> Encoder:
        """The encoder that is probed and exported: the teacher's where a method publishes that."""
        teachers = any(objective.judges_teacher for objective in self.objectives.values())
        return self.teacher.average if teachers else self.encoder

    def forward(
        self,
        batch: Batch | None,
        clock: Clock,
        *,
        features: Pooling | None = None,
        phase: Phase | None = None,
        given: Embeddings | None = None,
    ) -> tuple[Tensor | Embeddings, dict[str, Tensor]]:
        """(sum of weight x loss, metrics called ``<objective>/<metric>``). Equal views are normalised once and shared."""
        if features:
            return self.judged(self._only_view(batch)).pool(features), {}
        if phase is not None:
            return getattr(self, f"_{phase}")(batch, clock, given)
        nets, total, metrics = self._nets, torch.zeros((), device=batch.positions.device), {}
        for name, objective, views in self._shown(batch, clock):
            loss, own = objective(nets, views, clock, self.draw(name, batch, clock))
            total = total + objective.weight(clock) * loss
            metrics |= {f"{name}/{metric}": value for metric, value in own.items()}
        return total, metrics

    def after_step(self, clock: Clock) -> None:
        momentum = 1.0 if self.momentum is None else self.momentum.over(clock.total).at(clock.step)
        if self.teacher is not None:
            self.teacher.update(momentum)
        for objective in self.objectives.values():
            objective.after_step(clock, momentum)

    def restart(self) -> None:
        """Every average begins where its student stands, once that has been given the weights it starts from."""
        for part in self.modules():
            if isinstance(part, Twin):
                part.restart()

    def _embed(self, batch: Batch, clock: Clock, given: None) -> tuple[Embeddings, Embeddings]:
        embeddings, targets = {}, {}
        for name, objective, views in self._shown(batch, clock, coupled=True):
            draw = self.draw(name, batch, clock)
            embeddings |= {f"{name}/{key}": rows for key, rows in objective.embed(self._nets, views, draw).items()}
            targets |= {f"{name}/{key}": rows for key, rows in objective.targets(self._nets, views, draw).items()}
        assert not embeddings.keys() & targets.keys(), "an embedding and a target of one name"
        return embeddings, targets

    def _compare(self, batch: None, clock: Clock, given: Embeddings) -> tuple[Tensor, dict[str, Tensor]]:
        total, metrics = 0.0, {}
        for name, objective in self.objectives.items():
            if objective.couples_samples:
                own = {key.removeprefix(f"{name}/"): rows for key, rows in given.items() if key.startswith(f"{name}/")}
                loss, found = objective.compare(own, own, clock)
                total = total + objective.weight(clock) * loss
                metrics |= {f"{name}/{metric}": value for metric, value in found.items()}
        return total, metrics

    def _carry(self, batch: Batch, clock: Clock, given: Embeddings) -> tuple[Tensor, dict[str, Tensor]]:
        total, metrics, carried = torch.zeros((), device=batch.positions.device), {}, 0.0
        for name, objective, views in self._shown(batch, clock):
            draw = self.draw(name, batch, clock)
            if objective.couples_samples:
                embeddings = objective.embed(self._nets, views, draw)
                carried = carried + sum((rows * given[f"{name}/{key}"]).sum() for key, rows in embeddings.items())
                if dist.world() > 1:  # DDP waits for every parameter, and those of ``compare`` have had their gradient
                    carried = carried + 0.0 * sum(p.sum() for p in objective.parameters() if p.requires_grad)
            else:
                loss, own = objective(self._nets, views, clock, draw)
                total = total + objective.weight(clock) * loss
                metrics |= {f"{name}/{metric}": value for metric, value in own.items()}
        return total + carried, metrics | {"loss": total.detach()}

    def _health(self, batch: Batch, clock: Clock, given: Embeddings | None) -> tuple[Tensor, dict[str, Tensor]]:
        found = {}
        for name, objective, views in self._shown(batch, clock):
            with health.tokens_of(self.encoder) as tokens:
                loss, _ = objective(self._nets, views, clock, self.draw(name, batch, clock))
                found[f"{name}/token_gradient"] = health.gradient_norm(loss, tokens)
        largest = max(self.views, key=lambda view: (view.size, repr(view)))  # a set has no order of its own
        images = seen(batch, largest, self.normalize, seed=clock.seed)
        found |= health.attention_entropy(self.encoder, images[: health.ATTENDED])
        return torch.zeros(()), found | health.beside_teacher(self.encoder, self.teacher, images)

    @property
    def _nets(self) -> Nets:
        return Nets(student=self.encoder, teacher=self.teacher, restore=self.normalize.restore)

    def _shown(
        self, batch: Batch, clock: Clock, *, coupled: bool = False
    ) -> Iterator[tuple[str, Objective, dict[str, Tensor]]]:
        """(name, objective, its views of the batch) of the coupled objectives, then of the others unless they are left out.

        The coupled come first, so that what is embedded twice meets the same draws of stochastic depth both times.
        """
        ordered = sorted(self.objectives.items(), key=lambda each: not each[1].couples_samples)
        parts = {name: each for name, each in ordered if each.couples_samples or not coupled}
        asked = {view for objective in parts.values() for view in objective.views().values()}
        images = {view: seen(batch, view, self.normalize, seed=clock.seed) for view in asked}
        for name, objective in parts.items():
            yield name, objective, {role: images[view] for role, view in objective.views().items()}

    def pictures(self, batch: Batch, clock: Clock) -> Tensor | None:
        """[B, columns, C, H, W] in [0, 1]: what the first objective that can reconstruct makes of the batch, else None."""
        for name, objective in self.objectives.items():
            if hasattr(objective, "reconstruct"):
                images = seen(batch, objective.views()["image"], self.normalize, seed=clock.seed)
                with torch.no_grad():
                    columns = objective.reconstruct(self._nets, images, self.draw(name, batch, clock))
                return self.normalize.restore(torch.stack(columns, dim=1))
        return None

    def check_batch(self, num: int) -> None:
        for objective in self.objectives.values():
            objective.check_batch(num)

    def stacks(self) -> list[Stack]:
        return [stack for objective in self.objectives.values() for stack in objective.stacks()]

    def companions(self) -> list[nn.Module]:
        return [network for objective in self.objectives.values() for network in objective.companions()]

    @staticmethod
    def draw(objective: str, batch: Batch, clock: Clock) -> Draw:
        """The random numbers of an objective for this batch: a function of seed, ``<objective>.<name>`` and global position."""

        def drawn(name: str, num: int, *, host: bool = False) -> Tensor:
            positions = batch.positions if batch.host is None or not host else batch.host
            return uniform(clock.seed, purpose(f"{objective}.{name}"), positions, num)

        return drawn

    def _only_view(self, batch: Batch) -> Tensor:
        (images,) = batch.views.values()
        return self.normalize(images)

    def param_rules(self) -> list[Rule]:
        """The usual pair for everything but an encoder that waits or is optimised layer by layer, and objectives that bring
        rules for their own parameters. Where rates shrink towards the images, mask tokens are embeddings, whoever has them.
        """
        layered = (self.layer_decay, self.patch_lr) != (1.0, 1.0) or self.decay == "layers"
        embed = self.layer_decay ** (self.encoder.spec.depth + 1)
        tokens = rf"objectives\.({'|'.join(map(re.escape, self.objectives))})\.mask_token"
        masks = [Rule("mask_token", tokens, lr_scale=embed)] if embed != 1.0 else []
        skipped = f"(?!{tokens}$)" if masks else ""
        own = {rf"objectives\.{re.escape(name)}\.": (name, each.param_rules()) for name, each in self.objectives.items()}
        rules = [
            replace(rule, name=f"{name}.{rule.name}", pattern=f"{skipped}{place}(?:{rule.pattern})")
            for place, (name, rules) in own.items()
            for rule in rules
        ]
        taken = [place for place, (_, rules) in own.items() if rules]
        if layered or self.waits is not None:
            rules = self._encoder_rules(layered) + rules
            taken.append(r"encoder\.")
        everything = skipped + "".join(f"(?!{place})" for place in taken) + ".*"
        return decaying(decay_rules(everything) + masks + rules, self.decay)

    def _encoder_rules(self, layered: bool) -> list[Rule]:
        own = r"encoder\..*"
        if not layered:
            return decay_rules(own, prefix="encoder.", waits=self.waits)
        options = {"patch_lr": self.patch_lr, "decay": self.decay, "others": own}
        rules = layer_decay_rules(self.encoder.spec.depth, self.layer_decay, **options)
        return [replace(rule, name=f"encoder.{rule.name}", waits=self.waits) for rule in rules]


def _momentum(objectives: Mapping[str, Objective], asked: Schedule | None) -> Schedule | None:
    """That of the run's one teacher: what was asked for, else what all objectives that need one agree on."""
    wanted = {name: each.momentum for name, each in objectives.items() if each.momentum is not None}
    if asked is not None and not wanted:
        raise ConfigError(f"teacher: none of {', '.join(objectives)} looks at one; leave it out")
    if asked is None and len(set(wanted.values())) > 1:
        said = ", ".join(f"objectives.{name} {each.peak:g} to {each.final:g}" for name, each in wanted.items())
        raise ConfigError(f"one teacher serves the run, and its momentum is not agreed on ({said}); set teacher.momentum")
    return asked or next(iter(wanted.values()), None)
