"""Health: numbers of a few fixed training images that show a collapse before a loss does, and what is done about it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vitssl import dist
from vitssl.data.feed import evaluation_samples, share
from vitssl.errors import TrainingError
from vitssl.inspect.alarms import alarm
from vitssl.probes.spectrum import lidar, rankme, spread
from vitssl.schedule import Clock
from vitssl.train import checkpoint
from vitssl.train.loop import Event
from vitssl.train.session import Session
from vitssl.views import View

FILE = "health.jsonl"
ROLLBACKS = 3  # of a run, after which an alarm stops it


class Rollback(Exception):
    """The run goes on from an earlier checkpoint, with the images that come next."""


class Health:
    """Measures at step 0 and every ``health.every``; an alarm is told, and stops the run or sets it back where asked to."""

    def __init__(self, session: Session) -> None:
        self.session, config = session, session.config
        encoder = session.engine.task.encoder
        size = encoder.spec.image_size
        self.crops = [View(size=size, scale=(0.2, 1.0), flip=0.5, copy=copy) for copy in range(config.health.views)]
        self.samples = evaluation_samples(
            session.source,
            config.data,
            {*self.crops, *session.engine.task.views},
            seed=config.seed,
            channels=encoder.spec.channels,
            limit=config.health.images,
        )
        self.rows: list[dict[str, float]] = dist.gather_lists([_read(session.folder / FILE)])[0]  # the first process's
        self.told: set[str] = set()
        self.ended: str | None = None  # the alarm that stopped the run
        if session.start == 0:
            self.act(0)

    def event(self) -> Event:
        """For the loop."""
        return Event(every=self.session.steps(self.session.config.health.every), act=self.act)

    def act(self, step: int) -> bool:
        """Measure; true ends the run. Raises Rollback, on every process."""
        # the first process's, for all: decompositions of the same matrix may differ by a bit, and decide
        row = dist.gather_lists([{"step": step, **self._trained(step), **self._measure()}])[0]
        if any(step <= steps for rule, steps in self.session.plan.waits.items() if rule.startswith("encoder.")):
            row.pop("teacher_distance", None)  # a student that waits is what its teacher is
        self.rows.append(row)
        if self.session.engine.main:
            self.session.report.rows(FILE, [row])
            self.session.report.scalars({f"health/{key}": value for key, value in row.items() if key != "step"}, step)
        plan = self.session.plan
        met = plan.micro_batch * (plan.accumulation if self.session.engine.task.couples_samples else 1)
        policy = self.session.config.health.on_alarm
        name, said = alarm(self.rows, met=met, told=self.told if policy == "warn" else ()) or (None, None)
        if said is None:
            return False
        self.session.report.say(f"alarm at step {step:,}: {said}", style="bold red")
        self.told.add(name)
        if policy == "rollback":
            self._roll_back(step)
        self.ended = None if policy == "warn" else said
        return self.ended is not None

    def _roll_back(self, step: int) -> None:
        """To the newest checkpoint before the signs began, if there is one and this does not happen too often."""
        session = self.session
        well = self.rows[-3]["step"]
        kept = dist.gather_lists([[each for each in checkpoint.steps(session.folder / "checkpoints") if each <= well]])[0]
        if not kept or session.set_back >= ROLLBACKS:
            why = "no checkpoint is as old as that" if not kept else f"the run was set back {ROLLBACKS} times before"
            session.report.say(f"it stops here: {why}")
            return
        session.roll_back(to=kept[-1], at=step)
        session.report.say(f"back to step {kept[-1]:,}; the images of {step - kept[-1]:,} steps are passed over")
        raise Rollback

    def _trained(self, step: int) -> dict[str, float]:
        """Means of loss and metrics over the steps since the last measurement, the same on every process."""
        since = self.rows[-1]["step"] if self.rows else 0
        steps = [row for row in self.session.report.recent["metrics.jsonl"] if since < row["step"] <= step]
        names = [name for name in (steps[0] if steps else {}) if name == "loss" or "/" in name]
        return {name: sum(row[name] for row in steps) / len(steps) for name in names}

    def _measure(self) -> dict[str, float]:
        engine, config = self.session.engine, self.session.config
        clock = Clock(step=0, total=1, samples=0, seed=config.seed)
        engine.wrapped.eval()
        sums, features, count = {}, [], 0
        with torch.no_grad():
            for batch in share(self.samples, tell=lambda text: None, batch_size=32):
                _, told = engine.forward(
                    replace(batch, views={view: batch.views[view] for view in engine.task.views}), clock, phase="health"
                )
                for name, value in told.items():
                    sums[name] = sums.get(name, 0.0) + float(value) * len(batch)
                count += len(batch)
                rows = [engine.forward(replace(batch, views={view: batch.views[view]}), clock, features=config.pooling)[0]
                        for view in self.crops]  # fmt: skip
                features.append(torch.stack(rows, dim=1).float())  # [B, V, D]
        engine.wrapped.train()
        return self._together(sums, features, count)

    def _together(self, sums: dict[str, float], features: list[Tensor], count: int) -> dict[str, float]:
        """Means and spectra over all processes."""
        engine = self.session.engine
        parts = dist.gather_lists([(sums, count)])
        total = sum(number for _, number in parts)
        names = next(found for found, number in parts if number)
        row = {name: sum(found.get(name, 0.0) for found, _ in parts) / total for name in names}
        dim, views = engine.task.encoder.spec.dim, len(self.crops)
        own = torch.cat([torch.zeros(0, views, dim, device=engine.device), *features])
        every = dist.gather_rows(own)  # [N, V, D]
        weights = torch.stack([p.detach().float().norm() for p in engine.task.encoder.parameters() if p.requires_grad])
        spectrum = dict.fromkeys(("std", "rankme", "lidar"), math.nan)  # of features that are no numbers: the next loss says so
        if every.isfinite().all():
            spectrum = {"std": spread(every[:, 0]), "rankme": rankme(every[:, 0]), "lidar": lidar(every)}
        return row | spectrum | {"weights": float(weights.norm())}

    def refuse(self, reached: int) -> None:
        """After a run that an alarm ended. Raises TrainingError."""
        if self.ended:
            raise TrainingError(f"stopped at step {reached:,}, saved: {self.ended}. health.on_alarm=warn goes on all the same")


def _read(path: Path) -> list[dict[str, float]]:
    """The rows of an earlier start; a number that was none is written as null."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [{name: math.nan if value is None else value for name, value in json.loads(line).items()} for line in lines]
