"""Where files lie that are not on a local disk, and what a user allows there. One store a scheme, opened once a process."""

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path

from vitssl.data.stores.base import (
    NoRanges,
    Passing,
    Stat,
    Store,
    Unreachable,
    beside,
    globbed,
    is_url,
    parted,
    shown,
    unsigned,
    without_secrets,
)
from vitssl.errors import ConfigError

__all__ = [
    "USUAL",
    "Access",
    "NoRanges",
    "Passing",
    "Stat",
    "Store",
    "Unreachable",
    "beside",
    "globbed",
    "is_url",
    "open_store",
    "parted",
    "shown",
    "unsigned",
    "without_secrets",
]

GIB = 1 << 30


@dataclass(frozen=True)
class Access:
    """How remote data is reached. ``index_budget`` and ``cache_bytes`` in bytes; ``storage`` are options of the file system.

    ``cache`` keeps every range that was read; without it the user's cache keeps files of servers that know no ranges.
    """

    trusted: frozenset[str] = frozenset()
    shell: bool = False
    storage: str = "{}"  # JSON, so that it hashes
    index_budget: int = 10 * 10**9
    cache: Path | None = None
    cache_bytes: int = field(default=100 * GIB)


USUAL = Access()
"""What is allowed where the user said nothing."""


def open_store(url: str, access: Access) -> Store:
    """The store of a url's scheme. Raises ConfigError for a scheme that is unknown, not installed, or not allowed."""
    scheme = url.partition(":")[0].lower()
    if scheme in ("http", "https"):
        return _http(access.trusted)
    if scheme == "pipe":
        if not access.shell:
            raise ConfigError(
                f"{shown(url)[:60]!r}: would run a command of the shell; data.allow_shell_urls=true lets it, if you trust it"
            )
        return _pipe()
    return _s3(access.storage) if scheme == "s3" else _file_system(scheme, access.storage)


@functools.cache
def _http(trusted: frozenset[str]) -> Store:
    from vitssl.data.stores.http import HttpStore

    return HttpStore(trusted=trusted)


@functools.cache
def _pipe() -> Store:
    from vitssl.data.stores.pipe import PipeStore

    return PipeStore()


@functools.cache
def _s3(storage: str) -> Store:
    from vitssl.data.stores.s3 import S3Store

    return S3Store(json.loads(storage))


@functools.cache
def _file_system(scheme: str, storage: str) -> Store:
    from vitssl.data.stores.cloud import CloudStore

    return CloudStore(scheme, json.loads(storage))
