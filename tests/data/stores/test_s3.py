"""Shards in an S3-compatible object store: a real server (moto's) on loopback."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vitssl.data.sources import open_source
from vitssl.data.stores import Access, open_store
from vitssl.data.stores.base import Unreachable
from vitssl.data.stores.s3 import S3Store
from vitssl.errors import ConfigError, DataError

boto3 = pytest.importorskip("boto3", reason="needs pip install 'vitssl[s3]'")
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
    client = boto3.client("s3", endpoint_url=json.loads(access.storage)["endpoint_url"])
    client.create_bucket(Bucket="bucket")
    for path in shards.glob("*.tar"):
        client.upload_file(str(path), "bucket", f"set/{path.name}")
    return "s3://bucket/set"


@pytest.mark.parametrize("pattern", ["/train-{{000..002}}.tar", "/*.tar", "", "/"])
def test_the_same_samples_as_on_a_disk(bucket: str, access: Access, shards: Path, pattern: str) -> None:
    far, near = open_source(bucket + pattern.replace("{{", "{").replace("}}", "}"), access=access), open_source(shards)
    assert far.fingerprint == near.fingerprint and far.by_chunk
    assert [raw.image for raw in far.read(range(100))] == [raw.image for raw in near.read(range(100))]


def test_parquet_in_a_bucket(bucket: str, access: Access, parquet: Callable, tmp_path: Path) -> None:
    client = boto3.client("s3", endpoint_url=json.loads(access.storage)["endpoint_url"])
    client.upload_file(parquet("d/train-0.parquet"), "bucket", "rows/train-0.parquet")
    near = open_source(tmp_path / "d")
    for path, options in {"s3://bucket/rows": {"kind": "parquet"}, "s3://bucket/rows/*.parquet": {}}.items():
        far = open_source(path, access=access, **options)
        assert far.fingerprint == near.fingerprint and far.read([23])[0].image == near.read([23])[0].image
    assert open_source("s3://bucket/rows", split="train", kind="parquet", access=access).num_samples == 24
    with pytest.raises(DataError, match=r"no tar shards are there \(1 other files\); name kind=parquet"):
        open_source("s3://bucket/rows", access=access)


def test_answers_that_lack_what_they_should_say(access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    store = S3Store({})
    monkeypatch.setattr(store, "_ask", lambda *given, **named: {"Body": b"x"})
    with pytest.raises(DataError, match="does not say how long it is"):
        store.stat("s3://bucket/a.tar")
    with pytest.raises(DataError, match="answers with a range of ''"):
        store.read("s3://bucket/a.tar", 0, 1)


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
    with pytest.raises(DataError, match=r"s3://bucket/none: no tar shards are there"):
        open_source("s3://bucket/none", access=access)
    store = open_store(bucket, access)
    with pytest.raises(DataError, match=r"ends before byte"):
        store.read(f"{bucket}/train-000.tar", store.stat(f"{bucket}/train-000.tar").size - 5, 10)
    with pytest.raises(ConfigError, match=r"data\.storage"):
        open_source(bucket, access=Access(storage='{"no_such_option": 1}'))


def test_a_store_that_is_down(access: Access) -> None:
    store = S3Store({"endpoint_url": "http://127.0.0.1:9"}, tries=2)
    with pytest.raises(Unreachable, match=r"s3://bucket/a\.tar: cannot be reached \(.*127\.0\.0\.1:9"):
        store.stat("s3://bucket/a.tar")


def test_without_credentials(endpoint: str, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    boto3.client("s3", endpoint_url=endpoint).put_object_acl(Bucket="bucket", Key="set/train-000.tar", ACL="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(DataError, match=r"no credentials were found; .* or data\.storage\.anon=true"):
        S3Store({"endpoint_url": endpoint}).stat(f"{bucket}/train-000.tar")
    assert S3Store({"endpoint_url": endpoint, "anon": True}).stat(f"{bucket}/train-000.tar").size > 10_000


def test_many_objects_are_listed(endpoint: str, bucket: str) -> None:
    client = boto3.client("s3", endpoint_url=endpoint)
    for number in range(1002):
        client.put_object(Bucket="bucket", Key=f"many/{number:04}.tar", Body=b"x")
    store = S3Store({"endpoint_url": endpoint})
    assert store.find("s3://bucket/many/") == [f"s3://bucket/many/{number:04}.tar" for number in range(1002)]
    assert store.find("s3://bucket/many/000[1-3].tar") == [f"s3://bucket/many/000{number}.tar" for number in (1, 2, 3)]
    with pytest.raises(ConfigError, match="only the last part of an address may be a pattern"):
        store.find("s3://bucket/*/a.tar")
