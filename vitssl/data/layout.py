"""How the order over a source is laid out, and who reads it: lanes, windows, chunks and loader processes.

Of data that is read by chunk, lanes and windows are what fits in ``data.memory``, or the same bytes would come over the network
again and again. What was chosen is recorded with a run, and kept when it continues.
"""

import math
import os
from collections.abc import Sequence

from vitssl import dist
from vitssl.data.order import Layout, default_lanes
from vitssl.data.sources import Joined, ShardSource, Source
from vitssl.errors import ConfigError
from vitssl.sections import DataConfig

_ROOM = 4  # chunks for each lane: those that a window begins and ends in, and the half of it that is read ahead


def choose_layouts(source: Source, config: DataConfig, *, loaders: int = 1) -> list[Layout]:
    """Of each part: the config's lanes, else by its samples, so that any number of processes (to about 60) trains the same."""
    parts = source.parts if isinstance(source, Joined) else [source]
    return [_layout(part, config, loaders, memory=_memory(config) // len(parts)) for part in parts]


def _layout(part: Source, config: DataConfig, loaders: int, *, memory: int) -> Layout:
    if config.lanes is not None and config.lanes > part.num_samples:
        raise ConfigError(f"data.lanes={config.lanes}: there are only {part.num_samples:,} samples; take fewer, or null")
    most = memory / max(1, _ROOM * _largest(part)) if part.by_chunk else math.inf
    lanes = config.lanes or default_lanes(part.num_samples, loaders, most=most)
    chunk = part.chunk if isinstance(part, ShardSource) else None
    return Layout(lanes, choose_window(part, config.window, lanes=lanes, memory=memory), chunk)


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


def costs(source: Source, config: DataConfig, layouts: Sequence[Layout], *, readers: int = 1) -> list[str]:
    """What reading this data by chunk will cost beyond its bytes once an epoch, in words."""
    parts, found = source.parts if isinstance(source, Joined) else [source], []
    if readers > 1 and config.cache is None:
        instead = "" if isinstance(source, Joined) else ", or take data.lanes that processes x data.workers divide"
        found.append(
            f"{readers} loader processes fetch each byte: name data.cache, a folder on a local disk that they share{instead}"
        )
    for part, layout in zip(parts, layouts, strict=True):
        needed = 2 * layout.lanes * _largest(part) * len(parts) if part.by_chunk else 0
        if needed > _memory(config):
            found.append(
                f"{layout.lanes} lanes of chunks of up to {_largest(part) / 2**20:,.0f} MiB are more than data.memory holds, so"
                f" chunks are read again and again: data.memory={math.ceil(needed / 2**30)} or fewer data.lanes"
            )
        if isinstance(part, ShardSource) and (counted := int(part.manifest.counted.sum())):
            size = counted / len(part.manifest.shards) * part.num_samples * part.mean_bytes
            found.append(
                f"{counted:,} shards are counted and not indexed: each is read whole, once more, when its first image is needed"
                f" (about {size / 1e9:,.1f} GB in all); vitssl index spares that"
            )
    return found


def _memory(config: DataConfig) -> int:
    return round(config.memory * 2**30)


def _largest(source: Source) -> int:
    """Bytes of the largest chunk, by the mean."""
    return source.mean_bytes * int(source.chunks.max())
