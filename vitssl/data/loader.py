"""Batches of a run: which rows this process takes of each global batch, read and decoded by worker processes.

Process p of P takes rows r with r % P == p of every global batch, in micro-batches, in order; how many workers prepare them
changes nothing but the speed. The state of all this is one integer, the position the next global batch begins at.
Surprising: a failure crosses from a worker as a value and is raised here, because torch would wrap it in a traceback's text.
"""

import atexit
import itertools
import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vitssl.data.repeats import RepeatedOrder
from vitssl.data.samples import Samples
from vitssl.errors import ConfigError, DataError, UserError
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
        return _load(samples, _Training(start, stop, batch_size, micro_batch, rank, world), workers)
    parts = max(1, workers)
    samples = samples.among(world, parts)
    return _joined(_load(samples, _Training(start, stop, batch_size, micro_batch, rank, world, parts), workers), parts)


def evaluation_batches(
    samples: Samples, *, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
) -> Iterator[Batch]:
    """Each sample once over all processes, in the order of the ids: this process takes ids rank, rank + world, ...

    ``batch_size`` is that of this process; its last batch is short, and processes may differ by one sample, so sums are what
    is to be reduced. ``samples`` must have an order with ``shuffle=False``.
    """
    assert not samples.order.shuffle, "evaluation asks for an order with shuffle=False"
    return _load(samples, _Once(len(samples), batch_size, rank, world), workers)


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

    num_samples: int
    batch_size: int
    rank: int
    world: int

    def __iter__(self) -> Iterator[np.ndarray]:
        mine = np.arange(self.rank, self.num_samples, self.world)
        for first in range(0, len(mine), self.batch_size):
            yield mine[first : first + self.batch_size]


@dataclass(frozen=True)
class _Failure:
    message: str
    kind: type[UserError]


class _Guarded(Dataset):
    """Turns what a user can fix into a value that crosses processes as it is."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitems__(self, positions: Sequence[int]) -> Batch | _Failure | tuple:
        if not len(positions):
            return ()  # a worker's part of a micro-batch that has fewer images than there are workers
        try:
            return self.samples.__getitems__(positions)
        except UserError as error:
            return _Failure(str(error), type(error))


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


def _load(samples: Samples, positions: _Training | _Once, workers: int) -> Iterator[Batch]:
    loader = DataLoader(
        _Guarded(samples),
        batch_sampler=positions,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker if workers else None,
        # Fork starts in milliseconds; a worker touches neither the device nor more than one thread.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        generator=torch.Generator(),  # or starting to iterate would draw from the global generator
    )
    with _quiet_children():
        iterator = iter(loader)
    if workers:
        atexit.unregister(_end_workers)  # last registered, first called: before multiprocessing waits for its children
        atexit.register(_end_workers)
    try:
        while (batch := _next(iterator)) is not None:
            if isinstance(batch, _Failure):
                raise batch.kind(batch.message)
            yield batch
    finally:
        del iterator  # ends the workers, even while a traceback keeps this frame alive


@contextmanager
def _quiet_children() -> Iterator[None]:
    """Keep torch from raising a worker's death wherever the main thread happens to be; asking for a batch finds it as well."""
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _next(iterator: Iterator) -> Batch | _Failure | None:
    """The next batch, None after the last; what torch reports as a dead worker becomes a DataError."""
    try:
        return next(iterator, None)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise DataError(
            "a data worker was killed, most likely for want of memory or of space in /dev/shm; "
            "take fewer data.workers or a smaller micro_batch"
        ) from None


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _end_workers() -> None:
    """Workers ignore SIGTERM, which is all that multiprocessing would send those an exception left behind, and then wait."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _start_worker(worker: int) -> None:
    """Ctrl-C, and a batch system's SIGTERM, reach all processes: the loop finishes its step, and that needs the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    torch.set_num_threads(1)
