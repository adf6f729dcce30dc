"""Batches of a run: which rows this process takes of each global batch, read and decoded by worker processes.

Process p of P takes rows r with r % P == p of every global batch, in micro-batches, in order; how many workers prepare them
changes nothing but the speed. The state of all this is one integer, the position the next global batch begins at.
"""

import itertools
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vitssl.data.repeats import RepeatedOrder
from vitssl.data.samples import Samples
from vitssl.data.workers import load
from vitssl.errors import ConfigError
from vitssl.task import Batch


def batches(
    samples: Samples,
    *,
    start: int,
    stop: int | None,
    batch_size: int,
    micro_batch: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """This process's micro-batches of the global batches at positions ``start``, ``start + batch_size``, ... below ``stop``.

    ``start`` is any position of the run (samples consumed so far); ``stop=None`` never ends. Each global batch gives
    ``batch_size / (world * micro_batch)`` micro-batches. Raises ConfigError where that is no whole number, DataError for bad
    data. Close the iterator (or drop it) to end its workers.
    """
    per_step = world * micro_batch
    if batch_size % per_step:
        raise ConfigError(
            f"batch_size {batch_size} is not a multiple of {world} processes x micro_batch {micro_batch} = {per_step}; "
            f"take {batch_size // per_step * per_step or per_step} or {(batch_size // per_step + 1) * per_step}"
        )
    assert stop is None or (stop - start) % batch_size == 0, "a run ends at the end of a global batch"
    if not samples.source.by_chunk and not isinstance(samples.order, RepeatedOrder):
        return load(samples, _Training(start, stop, batch_size, micro_batch, rank, world), workers)
    parts = max(1, workers)
    samples = samples.among(world, parts)
    return _joined(load(samples, _Training(start, stop, batch_size, micro_batch, rank, world, parts), workers), parts)


def evaluation_batches(
    samples: Samples,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    positions: NDArray[np.int64] | None = None,
) -> Iterator[Batch]:
    """Each sample once over all processes, in the order of the ids: this process takes ids rank, rank + world, ...

    ``positions`` are instead those that this process takes, whatever others do. ``batch_size`` is that of this process; its
    last batch is short, and processes may differ by one sample, so sums are what is to be reduced. ``samples`` must have an
    order with ``shuffle=False``.
    """
    assert not samples.order.shuffle, "evaluation asks for an order with shuffle=False"
    mine = np.arange(rank, len(samples), world) if positions is None else positions
    return load(samples.among(world, max(1, workers)), _Once(mine, batch_size), workers)


@dataclass(frozen=True)
class _Training:
    """Yields the positions [micro_batch] of each micro-batch of one process.

    Of data that is read by chunk, or repeated, each comes in ``parts``, one for each worker: that of position p is
    p // world % parts, so a worker meets the same lanes again, and nobody else does, where processes x workers divides them.
    """

    start: int
    stop: int | None
    batch_size: int
    micro_batch: int
    rank: int
    world: int
    parts: int = 1

    def __iter__(self) -> Iterator[np.ndarray]:
        first = self.start
        while self.stop is None or first < self.stop:
            rows = np.arange(first + self.rank, first + self.batch_size, self.world)
            for micro_batch in rows.reshape(-1, self.micro_batch):
                owners = micro_batch // self.world % self.parts
                yield from (micro_batch[owners == part] for part in range(self.parts))
            first += self.batch_size


@dataclass(frozen=True)
class _Once:
    """Yields the positions of one process's share of an epoch."""

    mine: NDArray[np.int64]
    batch_size: int

    def __iter__(self) -> Iterator[np.ndarray]:
        for first in range(0, len(self.mine), self.batch_size):
            yield self.mine[first : first + self.batch_size]


def _joined(pieces: Iterator[Batch], parts: int) -> Iterator[Batch]:
    """Micro-batches from the ``parts`` of each, their rows in the order of their positions."""
    with closing(pieces):
        while found := [piece for piece in itertools.islice(pieces, parts) if piece]:
            rows = torch.argsort(torch.cat([piece.positions for piece in found]))
            keys = list(itertools.chain.from_iterable(piece.keys for piece in found))
            yield Batch(
                views={view: torch.cat([piece.views[view] for piece in found])[rows] for view in found[0].views},
                positions=torch.cat([piece.positions for piece in found])[rows],
                labels=None if found[0].labels is None else torch.cat([piece.labels for piece in found])[rows],
                keys=tuple(keys[row] for row in rows.tolist()),
                bad=tuple(sorted(itertools.chain.from_iterable(piece.bad for piece in found))),
            )
