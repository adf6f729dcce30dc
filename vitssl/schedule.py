"""Time: the one clock of a run, durations as people write them, and values that change along it."""

import math
import re
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Literal

from vitssl.errors import ConfigError


@dataclass(frozen=True)
class Clock:
    """The only time anyone is given: optimiser step ``step`` of ``total``, ``samples`` seen before it, the run's ``seed``."""

    step: int
    total: int
    samples: int
    seed: int


@dataclass(frozen=True)
class Duration:
    """A length of training: ``300ep`` (epochs), ``5%`` (of the run) or ``12_500`` (optimiser steps)."""

    value: float
    unit: Literal["ep", "%", "steps"]

    @classmethod
    def parse(cls, text: "str | int | float | Duration") -> "Duration":
        """Read what a user wrote. Raises ConfigError on anything else."""
        if isinstance(text, Duration):
            return text
        match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)\s*(ep|%|steps)?", str(text).strip())
        if match is None or isinstance(text, bool):
            raise ConfigError(f"{text!r} is not a duration; write epochs as 300ep, a share as 5%, or steps as 12_500")
        value, unit = float(match[1].replace("_", "")), match[2] or "steps"
        if unit == "steps" and value != int(value):
            raise ConfigError(f"{text!r} is not a whole number of steps; write epochs as 300ep or a share of the run as 5%")
        return cls(value=value, unit=unit)

    def steps(self, *, per_epoch: float, total: int | None = None) -> int:
        """The number of optimiser steps, rounded; a share needs the run's ``total`` steps."""
        if self.unit == "ep":
            return round(self.value * per_epoch)
        if self.unit == "%":
            if total is None:
                raise ConfigError(f"{self} is a share of the run, so it cannot say how long the run is; write epochs or steps")
            return round(self.value / 100 * total)
        return int(self.value)

    def __str__(self) -> str:
        number = str(int(self.value)) if self.value == int(self.value) else f"{Decimal(repr(self.value)):f}"
        return number if self.unit == "steps" else number + self.unit


@dataclass(frozen=True)
class Schedule:
    """A value along the run: linear warm-up from ``start`` to ``peak``, then ``shape`` down (or up) to ``final``.

    ``multistep`` has no end: the peak is multiplied by ``gamma`` at each of the steps ``milestones``.

    With the half cosine and ``start=0`` this is the schedule of MAE's ``util/lr_sched.py``, taken per iteration:
    step 0 has the value ``start``, and the value at step ``total`` would be ``final``. DINO's and I-JEPA's codes differ by a
    step: DINO's warm-up ends with ``peak`` one step early, which then comes twice; I-JEPA's first step has the second value.
    """

    peak: float
    start: float = 0.0
    final: float = 0.0
    warmup: int = 0
    total: int = 1
    shape: Literal["cosine", "linear", "constant", "multistep"] = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1

    def over(self, total: int) -> "Schedule":
        """The same values along a run of ``total`` steps."""
        return replace(self, total=total)

    def at(self, step: float) -> float:
        """The value at (fractional) optimiser step ``step``."""
        if step < self.warmup:
            return self.start + (self.peak - self.start) * step / self.warmup
        if self.shape == "constant":
            return self.peak
        if self.shape == "multistep":
            return self.peak * self.gamma ** sum(step >= milestone for milestone in self.milestones)
        progress = min(1.0, (step - self.warmup) / max(1e-12, self.total - self.warmup))
        rest = 1 - progress if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.final + (self.peak - self.final) * rest
