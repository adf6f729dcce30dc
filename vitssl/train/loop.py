"""The loop: one for every Task, every engine and both programs.

A step is: schedule, micro-batches forward and backward, one update, ``after_step``. Metrics stay on the device until they
are reported, so nothing in the step waits for it; every step's loss is written, the console shows the mean of the window.
"""

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from vitssl import dist
from vitssl.data import quarantine
from vitssl.errors import DataError, TrainingError
from vitssl.report import Report, duration
from vitssl.schedule import Clock, Schedule
from vitssl.task import Batch
from vitssl.train.launch import Engine
from vitssl.train.steps import exact_step, mean_step


@dataclass(frozen=True)
class Event:
    """Something done every ``every`` steps and after the last one: evaluation, a probe.

    Where ``act`` returns true (on every process) the run is saved and ends.
    """

    every: int
    act: Callable[[int], bool | None]

    def due(self, done: int, total: int) -> bool:
        """At each multiple of ``every`` and after the last step, but not twice where the two lie close together."""
        return done == total or (done % self.every == 0 and 2 * (total - done) >= self.every)


@dataclass
class Saving:
    """When ``save(step)`` writes a checkpoint: every ``every`` steps, and when ``minutes`` have passed since the last one.

    The first process's clock decides, and it asks once: the processes agree a step later.
    """

    save: Callable[[int], None]
    every: int
    minutes: float | None = None
    _asked: bool = False
    _at: float = field(default_factory=time.monotonic)

    def overdue(self) -> bool:
        if self.minutes is None or self._asked or dist.rank():
            return False
        self._asked = time.monotonic() - self._at > 60 * self.minutes
        return self._asked

    def now(self, step: int) -> None:
        self.save(step)
        self._asked, self._at = False, time.monotonic()


@dataclass
class Window:
    """The steps since the last line: still on the device, already written as rows, and what the host measured meanwhile."""

    began: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    paused: float = 0.0
    steps: list[dict[str, Tensor]] = field(default_factory=list)
    rows: list[dict[str, float]] = field(default_factory=list)
    bad: list[dict[str, Any]] = field(default_factory=list)  # samples that could not be used, of this process
    replaced: int = 0  # such samples since the program began, of all processes


def fit(
    engine: Engine,
    *,
    batches: Iterable[Batch],
    schedule: Schedule,
    decay: Schedule,
    start: int,
    total: int,
    batch_size: int,
    seed: int,
    log_every: int,
    report: Report,
    saving: Saving,
    consumed: Callable[[Batch], None],
    events: Sequence[Event] = (),
) -> int:
    """Train from step ``start`` to ``total``; returns the step reached, less than ``total`` after Ctrl-C or SIGTERM,
    or where an event has ended the run.

    ``schedule`` and ``decay``: learning rate and weight decay along the steps. ``consumed`` is told of every micro-batch as
    it is trained on.

    It also saves when it is told to stop, and when the data fail: that DataError is raised again, with nothing lost. Raises
    TrainingError, before anything is saved, where a loss is not finite.
    """
    agreement, window, feed = dist.Agreement(), Window(), _one_ahead(batches)
    engine.wrapped.train()
    with _stop_signals() as stop:
        for step in range(start, total):
            clock = Clock(step=step, total=total, samples=step * batch_size, seed=seed)
            done = step + 1
            rates = {"lr": schedule.at(step), "weight_decay": decay.at(step)}
            report_due = done % log_every == 0 or done == total
            events_due = [event for event in events if event.due(done, total)]
            try:
                norm = _step(engine, clock, feed, window, consumed, **rates, want_norm=report_due)
            except DataError:
                _flush(window, step, report, {})
                saving.now(step)
                raise
            stopping, overdue = agreement.vote(stop[0], saving.overdue())
            save_due = stopping or overdue or done % saving.every == 0 or done == total
            if report_due:
                shown = rates if decay.shape != "constant" else {"lr": rates["lr"]}
                measured = shown | _measure(window, norm, batch_size=batch_size)
                _flush(window, done, report, measured)
                _line(window, clock, measured, report, batch_size=batch_size)
                window = Window(replaced=window.replaced)
            elif events_due or save_due:
                _flush(window, done, report, {})
            paused, ended = time.perf_counter(), False
            for event in events_due:
                with _saved_if_alone(saving, done, last=done == total):
                    ended = bool(event.act(done)) or ended
            if save_due or ended:
                saving.now(done)
            if events_due:
                engine.wrapped.train()
            window.paused += time.perf_counter() - paused
            if (stopping or ended) and done < total:
                return done
    return total


def _one_ahead(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The micro-batches, each fetched before the one ahead of it is computed, so that all processes learn in time if one fails.

    Raises the DataError of the first process that has no batch, on each process and for the same micro-batch. Nothing waits:
    the votes travel while the device computes.
    """
    feed, agreement = iter(batches), dist.Agreement()
    upcoming = _fetched(feed)
    agreement.vote(isinstance(upcoming, DataError))
    while upcoming is not None:
        batch, upcoming = upcoming, _fetched(feed) if not isinstance(upcoming, DataError) else upcoming
        (failed,) = agreement.vote(isinstance(upcoming, DataError))
        if isinstance(batch, DataError) or (failed and dist.world() > 1):
            raise DataError(dist.first_said(str(batch) if isinstance(batch, DataError) else None))
        yield batch


def _fetched(feed: Iterator[Batch]) -> Batch | DataError | None:
    try:
        return next(feed, None)
    except DataError as error:
        return error


@contextmanager
def _saved_if_alone(saving: Saving, done: int, *, last: bool) -> Iterator[None]:
    """What a user must mend (test images of which none decodes) loses no step; several processes cannot agree on it here.

    The last step is not saved: a run that counts as finished has done all that comes before its last checkpoint.
    """
    try:
        yield
    except DataError:
        if dist.world() == 1 and not last:
            saving.now(done)
        raise


def _step(
    engine: Engine,
    clock: Clock,
    batches: Iterator[Batch],
    window: Window,
    consumed: Callable[[Batch], None],
    *,
    lr: float,
    weight_decay: float,
    want_norm: bool,
) -> Tensor | float | None:
    engine.waiting.begin_step(clock.step, engine.optimizer, lr=lr, weight_decay=weight_decay)

    def micro_batches() -> Iterator[Batch]:
        for _ in range(engine.accumulation):
            waiting = time.perf_counter()
            batch = next(batches)
            consumed(batch)
            window.bad += [{"step": clock.step + 1, **bad._asdict()} for bad in batch.bad]
            window.waited += time.perf_counter() - waiting
            yield batch

    phases = engine.task.couples_samples and engine.accumulation > 1
    sums = exact_step(engine, clock, micro_batches()) if phases else mean_step(engine, clock, micro_batches())
    norm = engine.step(want_norm=want_norm)
    engine.task.after_step(clock)
    window.steps.append(sums)
    return norm


def _measure(window: Window, norm: Tensor | float | None, *, batch_size: int) -> dict[str, float]:
    """What the host knows of a window. Reading the norm waits for the device, so the times are of finished steps."""
    norm = float("nan") if norm is None else float(norm)
    elapsed = max(1e-9, time.perf_counter() - window.began - window.paused)
    rate = (len(window.rows) + len(window.steps)) * batch_size / elapsed
    return {"grad_norm": norm, "images_per_s": float(f"{rate:.5g}"), "data_wait": round(window.waited / elapsed, 4)}


def _flush(window: Window, done: int, report: Report, measured: dict[str, float]) -> None:
    """Bring the window's metrics to the host (the one place that waits), check them, and write a row a step."""
    if not window.steps:
        return
    names = list(window.steps[0])
    values = torch.stack([torch.stack([step[name] for name in names]) for step in window.steps])  # [steps, metrics]
    values = (dist.sum_over_processes(values) / dist.world()).tolist()
    first = done - len(values) + 1
    rows = [{"step": first + index, **dict(zip(names, row, strict=True))} for index, row in enumerate(values)]
    for row in rows:
        if not math.isfinite(row["loss"]):
            raise TrainingError(
                f"the loss is {row['loss']} at step {row['step']}; nothing of it was saved. Lower optim.base_lr, set"
                " optim.clip=1.0 or take launch.precision=fp32, under another run.name"
            )
    report.rows("metrics.jsonl", [*rows[:-1], rows[-1] | measured])
    if bad := dist.gather_lists(window.bad):
        report.rows(quarantine.FILE, sorted(bad, key=lambda row: row["position"]))
        window.replaced += len(bad)
        window.bad.clear()
    window.rows += rows
    window.steps.clear()


def _line(window: Window, clock: Clock, measured: dict[str, float], report: Report, *, batch_size: int) -> None:
    """One line for the person and the same numbers for the trackers: means over the window's steps."""
    done, count = clock.step + 1, len(window.rows)
    means = {name: sum(row[name] for row in window.rows) / count for name in window.rows[0] if name != "step"}
    report.scalars({**means, **measured}, done)
    replaced = f"  {window.replaced:,} bad images" if window.replaced else ""
    left = duration((clock.total - done) * batch_size / measured["images_per_s"])
    report.progress(
        done,
        clock.total,
        f"step {done:,}/{clock.total:,}  eta {left}  loss {means['loss']:.4f}  grad {measured['grad_norm']:.3g}"
        f"  lr {measured['lr']:.3g}  {measured['images_per_s']:,.0f} images/s  wait {measured['data_wait']:.0%}{replaced}",
    )


@contextmanager
def _stop_signals() -> Iterator[list[bool]]:
    """A flag that Ctrl-C, SIGTERM and a terminal that closes raise; a second Ctrl-C interrupts at once.

    What the caller had ignored (nohup) stays ignored.
    """
    stop = [False]

    def ask(number: int, frame: FrameType | None) -> None:
        if stop[0] and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop[0] = True

    asked = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in asked}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
