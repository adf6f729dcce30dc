"""Shards behind fsspec: its file system in memory, and Google's store where its library and an emulator are installed."""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from vitssl.data.sources import open_source
from vitssl.data.stores import Access, cloud, open_store
from vitssl.data.stores.base import Unreachable
from vitssl.errors import ConfigError, DataError


@pytest.fixture
def memory(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder in this process's memory that holds the shards."""
    monkeypatch.setitem(cloud.SCHEMES, "memory", "")
    files = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        files.pipe(f"/set/{path.name}", path.read_bytes())
    yield "memory://set"
    files.rm("/set", recursive=True)


@pytest.mark.parametrize("pattern", ["/train-{{000..002}}.tar", "/*.tar", "", "/"])
def test_the_same_samples_as_on_a_disk(memory: str, shards: Path, pattern: str) -> None:
    far, near = open_source(memory + pattern.replace("{{", "{").replace("}}", "}")), open_source(shards)
    assert far.fingerprint == near.fingerprint and far.by_chunk
    assert [raw.image for raw in far.read(range(100))] == [raw.image for raw in near.read(range(100))]


def test_what_is_refused(memory: str) -> None:
    with pytest.raises(DataError, match=r"memory://set/train-009\.tar: is not there"):
        open_source(f"{memory}/train-009.tar")
    with pytest.raises(DataError, match=r"memory://none: no tar shards are there"):
        open_source("memory://none")
    store = open_store(memory, Access())
    with pytest.raises(DataError, match="ends before byte"):
        store.read(f"{memory}/train-000.tar", store.stat(f"{memory}/train-000.tar").size - 5, 10)
    with pytest.raises(ConfigError, match=r"xyz:// is none of the places"):
        open_source("xyz://set/a.tar")


def test_patience(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, failures = cloud.CloudStore("memory", {}, tries=3, wait=0.001), [OSError("reset by peer")] * 2
    read = type(store._files()).cat_file

    def fail(files: object, *given: object, **named: object) -> bytes:
        if failures:
            raise failures.pop()
        return read(files, *given, **named)

    monkeypatch.setattr(type(store._files()), "cat_file", fail)
    assert len(store.read(f"{memory}/train-000.tar", 10, 20)) == 20
    failures += [OSError("reset by peer")] * 3
    with pytest.raises(Unreachable, match=r"train-000\.tar: cannot be reached \(.*reset by peer"):
        store.read(f"{memory}/train-000.tar", 10, 20)
    failures[:] = [PermissionError("no")]
    with pytest.raises(DataError, match=r"is forbidden \(no\); look at your credentials"):
        store.read(f"{memory}/train-000.tar", 10, 20)


def test_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*given: object, **named: object) -> None:
        raise ImportError("no gcsfs")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(ConfigError, match=r"gs:// needs a library that is not installed: pip install 'vitssl\[gs\]'"):
        open_source("gs://bucket/a.tar")


def test_google(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # gRPC, which the emulator does not speak
    pytest.importorskip("gcsfs", reason="needs pip install 'vitssl[gs]'")
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="needs pip install gcp-storage-emulator")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    try:
        storage = {"token": "anon", "project": "none", "endpoint_url": os.environ["STORAGE_EMULATOR_HOST"]}
        files = fsspec.filesystem("gs", **storage)
        for path in shards.glob("*.tar"):
            files.pipe(f"bucket/set/{path.name}", path.read_bytes())
        far = open_source("gs://bucket/set", access=Access(storage=json.dumps(storage)))
        near = open_source(shards)
        assert far.fingerprint == near.fingerprint
        assert [raw.image for raw in far.read(range(100))] == [raw.image for raw in near.read(range(100))]
    finally:
        server.stop()
