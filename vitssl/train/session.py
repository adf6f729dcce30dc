"""A session: from a config to a prepared engine by the ladder of starting, then to the loop, with checkpoints on the way.

Both programs hand it how to build their task and what to feed it; it knows neither.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vitssl import dist
from vitssl.config import flat
from vitssl.data.feed import training_samples
from vitssl.data.ledger import Ledger
from vitssl.data.loader import batches
from vitssl.data.order import Layout
from vitssl.data.quarantine import Decided, bearable, count_bad, passing
from vitssl.data.sources import Source
from vitssl.data.transforms import Augment
from vitssl.errors import ConfigError
from vitssl.plan import Plan
from vitssl.report import Report
from vitssl.schedule import Duration
from vitssl.sections import ProgramConfig
from vitssl.task import Task
from vitssl.train import checkpoint
from vitssl.train.folder import (
    LEDGER,
    ROLLBACKS,
    begin,
    occupy,
    read_rollbacks,
    recorded,
    refuse_another_run,
    refuse_disagreement,
    refuse_other_data,
    run_folder,
    starting_point,
)
from vitssl.train.launch import Engine
from vitssl.train.loop import Event, Saving, fit
from vitssl.train.planning import batch_split, make_plan, outline
from vitssl.train.state import create_optimizer, gather, load_optimizer, load_task, waited
from vitssl.views import View

Open = Callable[[Report], Source]


@dataclass
class Session:
    """A run that is ready to train. ``start`` is the step it continues from, ``saved`` the step last written: to replace a
    whole checkpoint by its equal would leave none for a moment."""

    config: ProgramConfig
    engine: Engine
    plan: Plan
    source: Source
    report: Report
    start: int
    saved: int
    damaged: set[int] = field(default_factory=set)  # steps of checkpoints that were passed over
    passing: dict[int, Decided] = field(default_factory=dict)  # positions at which the network decided, when it was first here
    rollbacks: list[dict[str, int]] = field(default_factory=list)  # what led to ``start``: images that were passed over

    @property
    def folder(self) -> Path:
        return run_folder(self.config)

    @property
    def position(self) -> int:
        """Where the first batch begins: after what was trained on, and what was passed over by going back."""
        return self.start * self.plan.batch_size + sum(each["skipped"] for each in self.rollbacks)

    @property
    def set_back(self) -> int:
        """How often this run was set back, also to before where it was set back to once."""
        return max((each["times"] for each in self.rollbacks), default=0)

    def roll_back(self, *, to: int, at: int) -> None:
        """Let the next start be at checkpoint ``to`` and pass over all images up to step ``at``. Every process calls it."""
        dist.barrier()
        if self.engine.main:
            checkpoint.discard(self.folder / "checkpoints", after=to)
            passed = sum(each["skipped"] for each in self.rollbacks if each["step"] > to)  # whose rows do not lead to there
            row = {"step": to, "at": at, "skipped": (at - to) * self.plan.batch_size + passed, "times": self.set_back + 1}
            self.report.rows(ROLLBACKS, [row])
        self.report.recent.clear()  # what was measured since is of a run that is given up
        dist.barrier()

    def steps(self, length: Duration) -> int:
        """A duration in optimiser steps of this run, at least 1."""
        return max(1, length.steps(per_epoch=self.plan.steps_per_epoch, total=self.plan.steps))

    def save(self, step: int) -> None:
        """Write a checkpoint and drop the ones the policy does not keep. Every process calls it."""
        if step == self.saved:
            return
        data = {"samples": self.source.num_samples, "fingerprint": self.source.fingerprint}
        facts = {"samples": step * self.plan.batch_size, "layouts": self.plan.layouts, "data": data}
        gathered = gather(self.engine, step=step, facts=facts)
        if self.engine.main:
            policy = self.config.checkpoint
            root = self.folder / "checkpoints"
            checkpoint.save(root, gathered)
            every = self.steps(policy.keep_every) if policy.keep_every else None
            self.damaged.discard(step)
            checkpoint.prune(root, newest=step, keep_last=policy.keep_last, keep_every=every, damaged=self.damaged)
        dist.barrier()
        self.saved = step

    def fit(
        self,
        views: Iterable[View],
        *,
        channels: int,
        labels: bool = False,
        augment: Augment | None = None,
        events: Sequence[Event] = (),
    ) -> int:
        """Train to the end of the plan; returns the step reached."""
        config, plan = self.config, self.plan
        layouts = [Layout(*each) for each in plan.layouts]
        options = {"seed": config.seed, "layouts": layouts, "channels": channels, "labels": labels, "augment": augment}
        feed = batches(
            training_samples(self.source, config.data, views, passing=self.passing, batch_size=plan.batch_size, **options),
            start=self.position,
            stop=self.position + (plan.steps - self.start) * plan.batch_size,
            batch_size=plan.batch_size,
            micro_batch=plan.micro_batch,
            rank=dist.rank(),
            world=dist.world(),
            workers=plan.workers,
        )
        bad = count_bad(self.folder)
        every = self.steps(config.checkpoint.every) if config.checkpoint.every else plan.steps
        with closing(feed):
            return fit(
                self.engine,
                batches=bearable(feed, max_fraction=config.data.max_bad_fraction, seen=self.start * plan.batch_size, bad=bad),
                schedule=plan.lr_schedule(),
                decay=plan.decay_schedule(),
                start=self.start,
                total=plan.steps,
                batch_size=plan.batch_size,
                seed=config.seed,
                log_every=config.log.every,
                report=self.report,
                consumed=Ledger(self.folder / LEDGER, process=dist.rank()).write if config.data.ledger else lambda batch: None,
                saving=Saving(self.save, every=every, minutes=config.checkpoint.minutes),
                events=events,
            )

    def tell_stopped(self, reached: int, command: str) -> None:
        """The last line of a run that was told to stop."""
        again = "start the same launch again" if dist.world() > 1 else "run"
        self.report.rest()
        self.report.say(f"stopped at step {reached:,} of {self.plan.steps:,}, saved. To go on, {again}:  {command}")


def show_plan(config: ProgramConfig, build: Callable[[], Task], open_data: Open, report: Report) -> None:
    """``--plan``: everything derived, nothing trained, no GPU needed."""
    report.pairs("plan", make_plan(config, outline(build), open_data(report)).lines())


def begin_session(
    config: ProgramConfig, build: Callable[[], Task], open_data: Open, report: Report, *, fill: Callable[[Task], None]
) -> Session | None:
    """Climb the ladder: this folder's checkpoint, else ``init.resume``'s, else a new task. None: the run is finished.

    ``build`` makes the task (also on the meta device); ``fill`` gives a new run's task the weights it starts from.
    Raises ConfigError, DataError or CheckpointError before anything is written.
    """
    folder = run_folder(config)
    refuse_another_run(folder, config, report)
    shape = outline(build)
    micro_batch, accumulation = batch_split(config, shape)
    engine = Engine(
        config.launch,
        micro_batch=micro_batch,
        accumulation=accumulation,
        clip=config.optim.clip,
        clip_by=config.optim.clip_by,
        trackers=config.log.trackers,
        folder=folder,
    )
    with engine.accelerator.local_main_process_first():
        source = open_data(report)
    refuse_disagreement(source, micro_batch=micro_batch)
    there = checkpoint.steps(folder / "checkpoints")
    saved, where = starting_point(folder, config, report)
    start = saved.step if saved else 0
    if saved:
        refuse_other_data(saved, source, where=where)
    layouts = [Layout(*each) for each in saved.facts["layouts"]] if saved else None
    waits = {rule.name: waited(saved, rule.name)["steps"] for rule in shape.param_rules()} if saved else None
    plan = make_plan(config, shape, source, layouts=layouts, waits=waits)
    if start >= plan.steps:
        finished = f"{where} is finished: step {start:,} of {plan.steps:,}. A larger length goes on"
        if where != folder:
            raise ConfigError(f"init.resume={where}: nothing is left to do, {finished}")
        report.say(f"{finished}; run.name=... starts anew")
        return None
    torch.manual_seed(config.seed)
    task = build()
    if saved:
        load_task(task, saved, where=where)
    else:
        fill(task)
    decided, rollbacks = (passing(where), read_rollbacks(where, start)) if saved else ({}, [])
    dist.barrier()  # the file is cut below
    if engine.main:
        occupy(folder)
        if checkpoint.steps(folder / "checkpoints") != there:
            raise ConfigError(f"{folder}: another program has just written to it; run the same command again to go on")
        begin(folder, config, plan, step=start, rollbacks=rollbacks)
    dist.barrier()
    report.pairs(f"plan of {folder}", plan.lines())
    if saved:
        report.say(f"continuing {where} from step {start:,}")
    engine.prepare(task, config.optim, lr=plan.lr, waits=plan.waits)
    if saved:
        load_optimizer(engine, saved, where=where)
    else:
        create_optimizer(engine)
    report.trackers = engine.trackers(flat(recorded(config)), step=start)
    damaged = {step for step in there if step > start}
    options = {"start": start, "saved": start, "damaged": damaged, "passing": decided, "rollbacks": rollbacks}
    return Session(config, engine, plan, source, report, **options)
