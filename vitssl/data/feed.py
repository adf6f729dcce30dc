"""From the config's data sections to samples and batches: the one place that chooses orders, lanes and workers."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vitssl import dist, draws
from vitssl.data.loader import evaluation_batches
from vitssl.data.mixing import MixedOrder
from vitssl.data.order import Order, default_lanes
from vitssl.data.quarantine import Decided, read_quarantine
from vitssl.data.repeats import RepeatedOrder
from vitssl.data.samples import Samples
from vitssl.data.sources import Joined, Source, Subset, open_source
from vitssl.data.stores import Access
from vitssl.data.transforms import Augment
from vitssl.errors import ConfigError, DataError, UserError
from vitssl.sections import DataConfig, PlaceConfig, SourceConfig
from vitssl.task import Batch
from vitssl.views import View, purpose

BATCH = 64  # where nobody trains: a benchmark's
_PART = purpose("order of a part")

Progress = Callable[[int, int], None]


def open_configured(config: SourceConfig, *, key: str, progress: Progress | None = None) -> Source:
    """The source a config section names; ``key`` is the section, for messages. Raises ConfigError and DataError."""
    return _open(config, key, _access(config), progress)


def _access(config: SourceConfig) -> Access:
    return Access(
        trusted=frozenset(config.trusted_hosts),
        shell=config.allow_shell_urls,
        storage=json.dumps(config.storage, sort_keys=True),
        index_budget=round(config.index_budget * 1e9),
        cache=config.cache,
        cache_bytes=round(config.cache_size * 1e9),
    )


def _open(config: PlaceConfig, key: str, access: Access, progress: Progress | None) -> Source:
    mixed = getattr(config, "sources", [])
    if mixed and (config.path is not None or config.split is not None):
        raise ConfigError(f"{key}.path and {key}.sources are both given; keep one of them")
    if mixed:
        parts = [_open(each, f"{key}.sources.{number}", access, progress) for number, each in enumerate(mixed)]
        return Joined(parts, [each.weight for each in mixed])
    if config.path is None:
        raise ConfigError(
            f"{key}.path: has no value; name your images, as in {key}.path=/my/photos or {key}.path='my-{{00..99}}.tar'"
        )
    try:
        return open_source(config.path, kind=config.kind, split=config.split, access=access, progress=progress)
    except UserError as error:
        raise type(error)(f"{key}: {error}") from None


def training_samples(
    source: Source,
    config: DataConfig,
    views: Iterable[View],
    *,
    seed: int,
    lanes: Sequence[int],
    channels: int,
    labels: bool = False,
    augment: Augment | None = None,
    passing: Mapping[int, Decided] | None = None,
    batch_size: int | None = None,
) -> Samples:
    """Samples in the run's shuffled order; ``lanes`` are those of each part that the run was started with.

    ``passing`` are positions of this run that the network decided, which a continued run follows. Repeats need the global
    ``batch_size``. Raises ConfigError where it does not divide.
    """
    parts = source.parts if isinstance(source, Joined) else [source]
    seeds = [seed, *(draws.fold(seed, _PART, number) for number in range(1, len(parts)))]
    options = zip(parts, lanes, seeds, strict=True)
    memory = round(config.memory * 2**30)
    orders = []
    for part, count, own in options:
        window = choose_window(part, config.window, lanes=count, memory=memory // len(parts))
        orders.append(Order(part.chunks, seed=own, lanes=count, window=window))
    order = MixedOrder(orders, source.weights, seed=seed) if isinstance(source, Joined) else orders[0]
    if config.repeats > 1:
        order = RepeatedOrder(order, repeats=config.repeats, stride=_stride(config, batch_size or BATCH))
    options = {"seed": seed, "channels": channels, "labels": labels, "augment": augment}
    known = read_quarantine(config.quarantine)
    known = known._replace(positions={**known.positions, **(passing or {})})
    bad = {"substitute": config.max_bad_fraction > 0, "quarantine": known}
    return Samples(source, order, views, memory=memory, **bad, **_decoding(config), **options)


def _stride(config: DataConfig, batch_size: int) -> int:
    """Positions between two views of an image."""
    if config.repeats_in == "batches":
        return batch_size
    if batch_size % config.repeats:
        raise ConfigError(
            f"data.repeats={config.repeats} does not divide batch_size={batch_size}; take another, or data.repeats_in=batches"
        )
    return batch_size // config.repeats


def _decoding(config: DataConfig) -> dict[str, Any]:
    return {"exif": config.exif, "max_pixels": config.max_pixels, "patience": config.decode_seconds}


def evaluation_samples(
    source: Source,
    config: DataConfig,
    views: Iterable[View],
    *,
    seed: int = 0,
    channels: int,
    labels: bool = False,
    limit: int | None = None,
) -> Samples:
    """Samples in their own order, at most ``limit`` of them, spread evenly over the source, decoded as ``config`` says.

    A view with a random crop is drawn from (``seed``, the sample's place), so it is the same crop every time. Images that
    cannot be used are left out.
    """
    if limit is not None and limit < source.num_samples:
        source = Subset(source, np.linspace(0, source.num_samples - 1, limit).astype(np.int64))
    order = Order(source.chunks, seed=seed, lanes=1, shuffle=False)
    return Samples(source, order, views, seed=seed, channels=channels, labels=labels, leave_out=True, **_decoding(config))


def share(samples: Samples, *, tell: Callable[[str], None], batch_size: int = 128, workers: int = 0) -> Iterator[Batch]:
    """This process's part of an evaluation: over all processes each sample comes once.

    At the end ``tell`` gets a line about images that could not be used. Raises DataError, on every process, if none could.
    """
    bad, used = [], 0
    for batch in evaluation_batches(samples, batch_size=batch_size, rank=dist.rank(), world=dist.world(), workers=workers):
        bad, used = bad + [each.reason for each in batch.bad], used + len(batch)
        if len(batch):
            yield batch
    bad, used = dist.gather_lists(bad), sum(dist.gather_lists([used]))
    if bad and not used:
        raise DataError(f"{samples.source.name}: none of {len(samples):,} images can be used; the first: {bad[0]}")
    if bad:
        tell(f"{len(bad):,} of {len(samples):,} images of {samples.source.name} left out; the first: {bad[0]}")


def choose_lanes(source: Source, config: DataConfig, *, loaders: int = 1) -> list[int]:
    """Of each part: the config's lanes, else by its samples, so that any number of processes (to about 60) trains the same."""
    found = []
    for part in source.parts if isinstance(source, Joined) else [source]:
        if config.lanes is not None and config.lanes > part.num_samples:
            raise ConfigError(f"data.lanes={config.lanes}: there are only {part.num_samples:,} samples; take fewer, or null")
        found.append(config.lanes or default_lanes(part.num_samples, loaders))
    return found


def choose_window(source: Source, window: int, *, lanes: int, memory: int) -> int:
    """Samples that are shuffled together in each lane. By chunk: what fits ``memory`` with the half of it that is read ahead
    and the chunks that it begins and ends in."""
    if not source.by_chunk:
        return window
    room = memory / max(1, source.mean_bytes) / lanes  # samples of a lane
    return max(1, min(window, int((room - 2 * source.chunks.mean()) / 1.5)))


def choose_workers(config: DataConfig, *, device: str) -> int:
    """Loader processes for each training process: the config's, else the cores that training leaves (on a CPU: one)."""
    if config.workers is not None:
        return config.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", dist.world()))
    return 1 if device == "cpu" else max(1, min(16, cores // max(1, local) - 1))


def whole_lanes(source: Source, config: DataConfig, *, lanes: Sequence[int], workers: int) -> tuple[int, int]:
    """(workers, how many processes read each byte) by chunk: fewer workers than chosen, if each then has lanes of its own."""
    if not source.by_chunk:
        return workers, 1
    if config.workers is None:
        fitting = [fewer for fewer in range(1, workers + 1) if lanes[0] % (dist.world() * fewer) == 0]
        workers = max(fitting, default=workers)
    loaders = dist.world() * max(1, workers)
    return workers, loaders // math.gcd(loaders, lanes[0] if len(lanes) == 1 else 1)
