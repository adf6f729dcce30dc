"""Evaluation through the wrapper: every sample once, on any number of processes, means weighted by samples."""

from collections.abc import Iterable

import torch

from vitssl import dist
from vitssl.schedule import Clock
from vitssl.task import Batch
from vitssl.train.launch import Engine


def evaluate(engine: Engine, batches: Iterable[Batch], *, seed: int) -> dict[str, float]:
    """The task's loss and metrics over ``batches`` (this process's share), as means over all processes' samples.

    The clock stands at step 0 and positions are the samples' own, so masks and every other draw are the same each time.
    """
    clock = Clock(step=0, total=1, samples=0, seed=seed)
    engine.wrapped.eval()
    sums, count = {}, 0
    with torch.no_grad():
        for batch in batches:
            loss, metrics = engine.forward(batch, clock)
            for name, value in {"loss": loss, **metrics}.items():
                sums[name] = sums.get(name, 0) + value.double() * len(batch)
            count += len(batch)
    names = _names(sums)
    row = torch.tensor([*(float(sums.get(name, 0)) for name in names), count], dtype=torch.float64, device=engine.device)
    *totals, total = dist.sum_over_processes(row).tolist()
    return {name: value / total for name, value in zip(names, totals, strict=True)}


def _names(sums: dict[str, torch.Tensor]) -> list[str]:
    """The same names on every process, also on one whose share is empty."""
    return next((names for names in dist.gather_lists([list(sums)]) if names), [])
