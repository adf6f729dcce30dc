"""The loop: one for every Task, every engine and both programs.

A step is: schedule, micro-batches forward and backward, one update, ``after_step``. Metrics stay on the device until they
are reported, so nothing in the step waits for it; every step's loss is written, the console shows the mean of the window.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import torch
from torch import Tensor

from vitssl import dist
from vitssl.errors import TrainingError
from vitssl.report import Report, duration
from vitssl.schedule import Clock, Schedule
from vitssl.task import Batch
from vitssl.train.launch import Engine
from vitssl.train.optim import set_lr


@dataclass(frozen=True)
class Event:
    """Something done every ``every`` steps, and after the last one where ``last``: evaluation, a probe, a checkpoint."""

    every: int
    act: Callable[[int], None]
    last: bool = True

    def due(self, done: int, total: int) -> bool:
        """At each multiple of ``every`` and after the last step, but not twice where the two lie close together."""
        if done == total:
            return self.last or done % self.every == 0
        return done % self.every == 0 and not (self.last and 2 * (total - done) < self.every)


@dataclass
class Window:
    """The steps since the last line: still on the device, already written as rows, and what the host measured meanwhile."""

    began: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    paused: float = 0.0
    steps: list[dict[str, Tensor]] = field(default_factory=list)
    rows: list[dict[str, float]] = field(default_factory=list)


def fit(
    engine: Engine,
    *,
    batches: Iterator[Batch],
    schedule: Schedule,
    start: int,
    total: int,
    batch_size: int,
    seed: int,
    log_every: int,
    report: Report,
    events: Sequence[Event] = (),
    save: Callable[[int], None] = lambda step: None,
    save_minutes: float | None = None,
) -> int:
    """Train from step ``start`` to ``total``; returns the step reached, less than ``total`` after Ctrl-C or SIGTERM.

    ``save(step)`` writes a checkpoint; it is called every ``save_minutes`` and when the run is told to stop. Raises
    TrainingError, before anything is saved, where a loss is not finite.
    """
    agreement, window, saved_at = dist.Agreement(), Window(), time.monotonic()
    engine.wrapped.train()
    with _stop_signals() as stop:
        for step in range(start, total):
            clock = Clock(step=step, total=total, samples=step * batch_size, seed=seed)
            done = step + 1
            report_due = done % log_every == 0 or done == total
            events_due = [event for event in events if event.due(done, total)]
            norm = _step(engine, clock, batches, window, lr=schedule.at(step), want_norm=report_due)
            overdue = save_minutes is not None and time.monotonic() - saved_at > 60 * save_minutes
            stopping, saving = agreement.vote(stop[0], overdue)
            if report_due:
                measured = _measure(window, norm, lr=schedule.at(step), batch_size=batch_size)
                _flush(window, done, report, measured)
                _line(window, clock, measured, report, batch_size=batch_size)
                window = Window()
            elif events_due or stopping or saving:
                _flush(window, done, report, {})
            paused = time.perf_counter()
            for event in events_due:
                event.act(done)
            if saving or stopping:
                save(done)
                saved_at = time.monotonic()
            if events_due:
                engine.wrapped.train()
            window.paused += time.perf_counter() - paused
            if stopping and done < total:
                return done
    return total


def _step(
    engine: Engine, clock: Clock, batches: Iterator[Batch], window: Window, *, lr: float, want_norm: bool
) -> Tensor | float | None:
    engine.seed_step(clock)
    set_lr(engine.optimizer, lr)
    sums: dict[str, Tensor] = {}
    for number in range(engine.accumulation):
        waiting = time.perf_counter()
        batch = next(batches)
        window.waited += time.perf_counter() - waiting
        with engine.micro_step(last=number == engine.accumulation - 1):
            loss, metrics = engine.forward(batch, clock)
            engine.backward(loss)
        for name, value in {"loss": loss.detach(), **metrics}.items():
            sums[name] = sums.get(name, 0) + value.float() / engine.accumulation
    norm = engine.step(want_norm=want_norm)
    engine.task.after_step(clock)
    window.steps.append(sums)
    return norm


def _measure(window: Window, norm: Tensor | float | None, *, lr: float, batch_size: int) -> dict[str, float]:
    """What the host knows of a window. Reading the norm waits for the device, so the times are of finished steps."""
    norm = float("nan") if norm is None else float(norm)
    elapsed = max(1e-9, time.perf_counter() - window.began - window.paused)
    rate = (len(window.rows) + len(window.steps)) * batch_size / elapsed
    return {"lr": lr, "grad_norm": norm, "images_per_s": round(rate, 1), "data_wait": round(window.waited / elapsed, 4)}


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
    window.rows += rows
    window.steps.clear()


def _line(window: Window, clock: Clock, measured: dict[str, float], report: Report, *, batch_size: int) -> None:
    """One line for the person and the same numbers for the trackers: means over the window's steps."""
    done, count = clock.step + 1, len(window.rows)
    means = {name: sum(row[name] for row in window.rows) / count for name in window.rows[0] if name != "step"}
    report.scalars({**means, **measured}, done)
    left = duration((clock.total - done) * batch_size / measured["images_per_s"])
    report.progress(
        done,
        clock.total,
        f"step {done:,}/{clock.total:,}  eta {left}  loss {means['loss']:.4f}  grad {measured['grad_norm']:.3g}"
        f"  lr {measured['lr']:.3g}  {measured['images_per_s']:,.0f} images/s  wait {measured['data_wait']:.0%}",
    )


@contextmanager
def _stop_signals() -> Iterator[list[bool]]:
    """A flag that Ctrl-C and SIGTERM raise; a second Ctrl-C interrupts at once."""
    stop = [False]

    def ask(number: int, frame: FrameType | None) -> None:
        if stop[0] and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop[0] = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
