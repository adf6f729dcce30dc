"""Batches of a run: which rows this process takes of each global batch, read and decoded by worker processes.

Process p of P takes rows r with r % P == p of every global batch, in micro-batches, in order; how many workers prepare them
changes nothing but the speed. The state of all this is one integer, the position the next global batch begins at.
Surprising: a failure crosses from a worker as a value and is raised here, because torch would wrap it in a traceback's text.
"""

import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vitssl import draws
from vitssl.data import transforms
from vitssl.data.order import Order
from vitssl.data.sources.base import Raw, Source
from vitssl.errors import ConfigError, DataError, UserError
from vitssl.task import Bad, Batch
from vitssl.views import View, purpose

_AUGMENT, _SUBSTITUTE = purpose("augment"), purpose("substitute")


class Samples(Dataset):
    """The samples of a source in an order, as the views ask for them. Indexed by global positions of the run.

    ``labels=True`` asks for labels (DataError where the source has not all of them). ``augment`` is applied to every view.
    ``substitute``: an image that does not decode, or whose key ``quarantine`` holds, is replaced by another of the source, a
    function of (seed, position) and of the bytes alone; the batch says so.
    """

    def __init__(
        self,
        source: Source,
        order: Order,
        views: Iterable[View],
        *,
        seed: int,
        channels: int = 3,
        labels: bool = False,
        augment: transforms.Augment | None = None,
        substitute: bool = False,
        quarantine: frozenset[str] = frozenset(),
    ) -> None:
        self.substitute, self.quarantine = substitute, quarantine
        self.source, self.order, self.views = source, order, tuple(views)
        self.seed, self.channels, self.labels, self.augment = seed, channels, labels, augment
        assert order.num_samples == source.num_samples, "the order was made for another source"
        if labels and not source.labels:
            missing = getattr(source, "num_unlabelled", source.num_samples)
            lacking = f"{missing:,} of {source.num_samples:,} samples have no label"
            raise DataError(f"{source.name}: {lacking}, and labels are needed here; name a labelled set")

    def __len__(self) -> int:
        """Samples in one epoch."""
        return self.source.num_samples

    def __getitem__(self, position: int) -> Batch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """The batch of the samples at these [B] global positions. Raises DataError for one that cannot be read or decoded."""
        positions = np.array(positions, dtype=np.int64)
        raws = self.source.read(self.order.locate(positions))
        numbers = {view: transforms.draw_numbers(view, seed=self.seed, positions=positions).tolist() for view in self.views}
        seeds = {view: self._augment_seeds(view, positions) for view in self.views}
        pixels = {view: np.empty((len(raws), *view.size, self.channels), dtype=np.uint8) for view in self.views}
        keys, bad = tuple(raw.key for raw in raws), []
        for row, raw in enumerate(raws):
            image, reason = self._decoded(raw)
            if image is None:
                raws[row], image = self._another(int(positions[row]), reason)
                bad.append(Bad(int(positions[row]), raw.key, raws[row].key, reason, known=raw.key in self.quarantine))
            for view in self.views:
                pixels[view][row] = transforms.show(
                    image, view, numbers[view][row], augment=self.augment, augment_seed=seeds[view][row]
                )
        return Batch(
            views={view: torch.from_numpy(images).permute(0, 3, 1, 2).contiguous() for view, images in pixels.items()},
            positions=torch.from_numpy(positions),
            labels=torch.tensor([raw.label for raw in raws]) if self.labels else None,
            keys=keys,
            bad=tuple(bad),
        )

    def _decoded(self, raw: Raw) -> tuple[transforms.Pixels | None, str]:
        """(image, "") or (None, why not)."""
        if raw.key in self.quarantine:
            return None, f"{raw.where}: named in the quarantine file"
        try:
            return transforms.decode(raw, self.channels), ""
        except DataError as error:
            if not self.substitute:
                raise
            return None, str(error)

    def _another(self, position: int, reason: str) -> tuple[Raw, transforms.Pixels]:
        """The first that decodes of ten samples drawn for a position. Raises DataError where none does."""
        drawn = draws.hashed(self.seed, _SUBSTITUTE, torch.tensor([position]), 10)[0] & 0x7FFFFFFFFFFFFFFF
        for raw in self.source.read((drawn % len(self)).tolist()):
            image, _ = self._decoded(raw)
            if image is not None:
                return raw, image
        raise DataError(f"{reason}; nor do ten others of {self.source.name}: look at the data")

    def _augment_seeds(self, view: View, positions: np.ndarray) -> list[int]:
        if self.augment is None:
            return [0] * len(positions)
        hashes = draws.hashed(self.seed, draws.fold(_AUGMENT, view.purpose), torch.from_numpy(positions), 1)
        return (hashes[:, 0] & 0x7FFFFFFFFFFFFFFF).tolist()


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
    return _load(samples, _Training(start, stop, batch_size, micro_batch, rank, world), workers)


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
    """Yields the positions [micro_batch] of each micro-batch of one process."""

    start: int
    stop: int | None
    batch_size: int
    micro_batch: int
    rank: int
    world: int

    def __iter__(self) -> Iterator[np.ndarray]:
        first = self.start
        while self.stop is None or first < self.stop:
            rows = np.arange(first + self.rank, first + self.batch_size, self.world)
            yield from rows.reshape(-1, self.micro_batch)
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

    def __getitems__(self, positions: Sequence[int]) -> Batch | _Failure:
        try:
            return self.samples.__getitems__(positions)
        except UserError as error:
            return _Failure(str(error), type(error))


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


def _start_worker(worker: int) -> None:
    """Ctrl-C, and a batch system's SIGTERM, reach all processes: the loop finishes its step, and that needs the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    torch.set_num_threads(1)
