"""Shards in an S3-compatible object store: a real server (moto's) on loopback, through s3fs."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from vitssl.data.sources import open_source
from vitssl.data.stores import Access, open_store
from vitssl.data.stores.base import Unreachable
from vitssl.errors import ConfigError, DataError

pytest.importorskip("s3fs", reason="needs pip install 'vitssl[s3]'")
server_module = pytest.importorskip("moto.server", reason="needs pip install 'vitssl[test]'")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def access(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Access:
    """Credentials from the environment, the endpoint as an option."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return Access(storage=json.dumps({"endpoint_url": endpoint}))


@pytest.fixture
def bucket(access: Access, shards: Path) -> str:
    """A bucket that holds the shards in a folder."""
    import s3fs

    files = s3fs.S3FileSystem(endpoint_url=json.loads(access.storage)["endpoint_url"])
    if not files.exists("bucket"):
        files.mkdir("bucket")
    for path in shards.glob("*.tar"):
        files.put_file(str(path), f"bucket/set/{path.name}")
    return "s3://bucket/set"


@pytest.mark.parametrize("pattern", ["/train-{{000..002}}.tar", "/*.tar", "", "/"])
def test_the_same_samples_as_on_a_disk(bucket: str, access: Access, shards: Path, pattern: str) -> None:
    far, near = open_source(bucket + pattern.replace("{{", "{").replace("}}", "}"), access=access), open_source(shards)
    assert far.fingerprint == near.fingerprint and far.by_chunk
    assert [raw.image for raw in far.read(range(100))] == [raw.image for raw in near.read(range(100))]


def test_a_fork_reads_too(bucket: str, access: Access, shards: Path) -> None:
    from vitssl.data.loader import batches
    from vitssl.data.order import Order
    from vitssl.data.samples import Samples
    from vitssl.views import View

    source = open_source(bucket, access=access)
    source.read([0])
    samples = Samples(source, Order(source.chunks, seed=0), [View(size=(8, 8))], seed=0)
    keys = [
        key for batch in batches(samples, start=0, stop=100, batch_size=10, micro_batch=10, workers=2) for key in batch.keys
    ]
    assert sorted(keys) == sorted(raw.key for raw in open_source(shards).read(range(100)))


def test_what_is_refused(bucket: str, access: Access, endpoint: str) -> None:
    with pytest.raises(DataError, match=r"s3://bucket/set/train-009\.tar: is not there"):
        open_source(f"{bucket}/train-009.tar", access=access)
    with pytest.raises(DataError, match=r"s3://bucket/none: no tar shard is there"):
        open_source("s3://bucket/none", access=access)
    store = open_store(bucket, access)
    with pytest.raises(DataError, match=r"ends before byte"):
        store.read(f"{bucket}/train-000.tar", store.stat(f"{bucket}/train-000.tar").size - 5, 10)
    with pytest.raises(ConfigError, match=r"data\.storage"):
        open_source(bucket, access=Access(storage='{"no_such_option": 1}'))


def test_a_store_that_is_down(access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    quick = {"endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"retries": {"max_attempts": 1}}}
    down = Access(storage=json.dumps(quick))
    with pytest.raises(Unreachable, match=r"s3://bucket/a\.tar: cannot be reached \(.*4 tries\)"):
        open_store("s3://bucket/a.tar", down).stat("s3://bucket/a.tar")
