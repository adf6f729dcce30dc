"""From the config's data sections to samples and batches."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vitssl import dist, draws
from vitssl.data.loader import evaluation_batches
from vitssl.data.mixing import MixedOrder
from vitssl.data.order import Layout, Order
from vitssl.data.quarantine import Decided, read_quarantine
from vitssl.data.repeats import RepeatedOrder
from vitssl.data.samples import Samples
from vitssl.data.sources import Balanced, Joined, ShardSource, Source, Subset, open_source
from vitssl.data.stores import Access, without_secrets
from vitssl.data.transforms import Augment
from vitssl.errors import ConfigError, DataError, UserError
from vitssl.sections import DataConfig, PlaceConfig, SourceConfig
from vitssl.task import Batch
from vitssl.views import View, purpose

BATCH = 64  # where nobody trains: a benchmark's
_PART = purpose("order of a part")
_SECRET = re.compile(r"secret|passw|passphrase|credential|session_token|account_key|^key$|^sas", flags=re.IGNORECASE)
_NO_SECRETS = ("anon", "google_default", "cache", "cloud", "browser")  # what a token may say of where to look for one

Progress = Callable[[int, int], None]


def open_configured(config: SourceConfig, *, key: str, progress: Progress | None = None) -> Source:
    """The source a config section names; ``key`` is the section, for messages. Raises ConfigError and DataError."""
    return _open(config, key, _access(config), progress)


def _access(config: SourceConfig) -> Access:
    for name, value in config.storage.items():
        if _SECRET.search(name) or (name == "token" and value not in _NO_SECRETS):
            raise ConfigError(
                f"data.storage.{name}: a config is written down, so it is no place for secrets; give it in the environment, or"
                " in the file where the store's own tools look for it"
            )
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
        raise type(error)(f"{key}: {without_secrets(str(error))}") from None


def refuse_training_settings(config: DataConfig, *, key: str) -> None:
    """Raise ConfigError for settings of how images are trained on, where each is only looked at, once."""
    names = ("repeats", "quarantine", "ledger")
    given = [name for name in names if getattr(config, name) != DataConfig.model_fields[name].default]
    given += ["sources: weight"] if len({each.weight for each in config.sources}) > 1 else []
    if given:
        raise ConfigError(f"{key}.{given[0]}: is about training, and here every image is looked at once; leave it out")


def training_samples(
    source: Source,
    config: DataConfig,
    views: Iterable[View],
    *,
    seed: int,
    layouts: Sequence[Layout],
    channels: int,
    labels: bool = False,
    augment: Augment | None = None,
    passing: Mapping[int, Decided] | None = None,
    batch_size: int | None = None,
) -> Samples:
    """Samples in the run's shuffled order; ``layouts`` are those of each part that the run was started with.

    ``passing`` are positions of this run that the network decided, which a continued run follows. Repeats need the global
    ``batch_size``. Raises ConfigError where it does not divide.
    """
    parts = source.parts if isinstance(source, Joined) else [source]
    seeds = [seed, *(draws.fold(seed, _PART, number) for number in range(1, len(parts)))]
    orders = []
    for part, layout, own in zip(parts, layouts, seeds, strict=True):
        if isinstance(part, ShardSource) and layout.chunk is not None:
            part.recut(layout.chunk)
        orders.append(Order(part.chunks, seed=own, lanes=layout.lanes, window=layout.window))
    order = MixedOrder(orders, source.weights, seed=seed) if isinstance(source, Joined) else orders[0]
    order = source.order(seed) if isinstance(source, Balanced) else order
    if config.repeats > 1:
        order = RepeatedOrder(order, repeats=config.repeats, stride=_stride(config, batch_size or BATCH))
    options = {"seed": seed, "channels": channels, "labels": labels, "augment": augment}
    known = read_quarantine(config.quarantine)
    known = known._replace(positions={**known.positions, **(passing or {})})
    bad = {"substitute": config.max_bad_fraction > 0, "quarantine": known}
    return Samples(source, order, views, memory=round(config.memory * 2**30), **bad, **_decoding(config), **options)


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
    return {name: getattr(config, name) for name in ("exif", "max_pixels", "arrays")} | {"patience": config.decode_seconds}


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
