"""Writes webdataset shards: whole or not at all, and the same bytes every time."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path


def write_shard(path: Path, samples: Iterable[Mapping[str, str | bytes]]) -> None:
    """A tar of samples ``{"__key__": key, extension: bytes, ...}``, under a temporary name until it is complete."""
    from webdataset import TarWriter  # imports torch: only where a shard is written

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    owner = {"user": "vitssl", "group": "vitssl", "mode": 0o644, "mtime": 0}
    try:
        with temporary.open("wb") as stream, TarWriter(stream, **owner, encoder=False) as tar:
            for sample in samples:
                tar.write(sample)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
