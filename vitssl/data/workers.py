"""Loader processes: started, watched, and started again where decoding an image costs one of them.

A decoder that never returns, or that takes its process with it, is no reason to lose a run: each worker notes in shared memory
what it works on, and the image it was at is replaced when the others go on. Surprising: a failure crosses from a worker as a
value and is raised here, because torch would wrap it in a traceback's text.
"""

import atexit
import itertools
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.sharedctypes import RawArray

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from vitssl.data.samples import Samples
from vitssl.errors import DataError, UserError
from vitssl.task import Batch

_LOOK = 2.0  # seconds without a batch after which the workers are looked at
_FATAL = {-number: number.name for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)}


def load(samples: Samples, positions: Iterable[np.ndarray], workers: int) -> Iterator[Batch]:
    """A batch for each array of positions, in order, made by ``workers`` processes, or by this one where there are none.

    Raises DataError for bad data. Close the iterator (or drop it) to end its workers.
    """
    delivered = 0
    while True:
        pulses = RawArray("q", 2 * max(1, workers))
        iterator = _begin(samples, _From(positions, delivered), workers, pulses)
        try:
            while (batch := _next(iterator, pulses, patience=samples.patience)) is not None:
                if isinstance(batch, _Failure):
                    raise batch.kind(batch.message)
                delivered += 1
                yield batch
            return
        except _Lost as lost:
            for worker in iterator._workers:  # the others hold nothing that cannot be made again
                worker.kill()
            samples = samples.without(lost.positions, lost.reason)
        finally:
            del iterator  # ends the workers, even while a traceback keeps this frame alive


class _Lost(Exception):
    """Workers that did not come back from the images at these positions."""

    def __init__(self, positions: list[int], reason: str) -> None:
        self.positions, self.reason = positions, reason


@dataclass(frozen=True)
class _From:
    """The arrays of positions that are still to be delivered."""

    positions: Iterable[np.ndarray]
    delivered: int

    def __iter__(self) -> Iterator[np.ndarray]:
        return itertools.islice(iter(self.positions), self.delivered, None)


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


def _begin(samples: Samples, positions: _From, workers: int, pulses: Sequence[int]) -> Iterator:
    loader = DataLoader(
        _Guarded(samples),
        batch_sampler=positions,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        timeout=_LOOK if workers else 0,
        worker_init_fn=partial(_start_worker, pulses=pulses) if workers else None,
        # Fork starts in milliseconds; a worker touches neither the device nor more than one thread.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        generator=torch.Generator(),  # or starting to iterate would draw from the global generator
    )
    if workers:
        atexit.unregister(_end_workers)  # last registered, first called: before multiprocessing waits for its children
        atexit.register(_end_workers)
    with _quiet_children():
        return iter(loader)


@contextmanager
def _quiet_children() -> Iterator[None]:
    """Keep torch from raising a worker's death wherever the main thread happens to be; asking for a batch finds it as well."""
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _next(iterator: Iterator, pulses: Sequence[int], *, patience: float) -> Batch | _Failure | None:
    """The next batch, None after the last. Raises _Lost, and DataError for a worker that something else killed."""
    while True:
        try:
            return next(iterator, None)
        except RuntimeError as error:
            if str(error).startswith("DataLoader timed out"):
                _look_for_hung(pulses, patience)
            elif str(error).startswith("DataLoader worker"):
                raise _of_the_dead(iterator, pulses) from None
            else:
                raise
        except (OSError, EOFError):  # a batch in the hands of a worker that died
            time.sleep(0.2)
            if all(worker.is_alive() for worker in iterator._workers):
                raise
            raise _of_the_dead(iterator, pulses) from None


def _look_for_hung(pulses: Sequence[int], patience: float) -> None:
    now = time.monotonic_ns()
    at_work = [(pulses[number] - 1, now - pulses[number + 1]) for number in range(0, len(pulses), 2) if pulses[number]]
    hung = [position for position, nanoseconds in at_work if nanoseconds > patience * 1e9]
    if hung:
        raise _Lost(hung, f"decoding did not end within {patience:g} s")


def _of_the_dead(iterator: Iterator, pulses: Sequence[int]) -> Exception:
    """What a dead worker means: an image that took it along, or someone who killed it."""
    codes = [worker.exitcode for worker in iterator._workers]
    lost = [pulses[2 * number] - 1 for number, code in enumerate(codes) if code in _FATAL and pulses[2 * number]]
    if lost:
        return _Lost(lost, f"decoding ended its process ({next(_FATAL[code] for code in codes if code in _FATAL)})")
    return DataError(
        "a data worker was killed, most likely for want of memory or of space in /dev/shm; "
        "take fewer data.workers or a smaller micro_batch"
    )


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _end_workers() -> None:
    """Workers ignore SIGTERM, which is all that multiprocessing would send those an exception left behind, and then wait."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _start_worker(worker: int, *, pulses: Sequence[int]) -> None:
    """Ctrl-C, and a batch system's SIGTERM, reach all processes: the loop finishes its step, and that needs the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    torch.set_num_threads(1)

    def pulse(position: int | None) -> None:
        pulses[2 * worker + 1] = time.monotonic_ns()
        pulses[2 * worker] = 0 if position is None else position + 1

    get_worker_info().dataset.samples.pulse = pulse
