"""Shards on web servers: the same samples under the same ids as on a disk, each byte read once, whatever the server does."""

import collections
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from webserver import WebServer, serving, url

from vitssl.data.index import SUFFIX
from vitssl.data.loader import batches, evaluation_batches
from vitssl.data.manifest import NAME, index_shards
from vitssl.data.order import Order
from vitssl.data.samples import Samples
from vitssl.data.sources import open_source
from vitssl.data.sources.base import cut
from vitssl.data.stores import Access
from vitssl.errors import ConfigError, DataError
from vitssl.views import View

VIEW = View(size=(8, 8), scale=(0.3, 1.0))


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("cached", [True, False])
def test_the_same_samples_as_on_a_disk(shards: Path, tmp_path: Path, ranges: bool, cached: bool) -> None:
    with serving(shards, ranges=ranges) as server:
        far = open_source(url(server), access=Access(cache=tmp_path / "cache" if cached else None))
        near = open_source(shards)
        assert (far.num_samples, far.fingerprint, far.labels) == (near.num_samples, near.fingerprint, near.labels)
        assert far.by_chunk and not near.by_chunk
        for source in (far, pickle.loads(pickle.dumps(far))):
            ids = np.random.default_rng(0).integers(0, 100, 150)
            for mine, theirs in zip(source.read(ids), near.read(ids), strict=True):
                assert mine._replace(where="") == theirs._replace(where="")
        assert far.label_array().tolist() == near.label_array().tolist()
        before = server.bytes
        open_source(url(server)).read(range(100))  # the index is in the cache
        if cached and not ranges:
            assert server.bytes - before < 1000


def test_a_manifest_and_sidecars_that_lie_beside_the_shards_are_used(shards: Path, server: WebServer) -> None:
    open_source(shards)  # writes them
    assert (shards / NAME).exists()
    source = open_source(url(server))
    assert [path for path, _ in server.requests] == [NAME, NAME, "about.json"]  # its size, then all of it; class names
    server.requests.clear()
    source.read(range(40))
    assert {path for path, _ in server.requests} == {f"train-000.tar{SUFFIX}", "train-000.tar"}
    folder = open_source(server.url)  # a server lists nothing, but the manifest does
    assert folder.fingerprint == source.fingerprint
    assert open_source(server.url, split="train").num_samples == 100
    with pytest.raises(DataError, match=r"none of its 3 shards is named test-\*\.tar"):
        open_source(server.url, split="test")


def test_a_folder_without_a_manifest(server: WebServer) -> None:
    with pytest.raises(ConfigError, match="web server"):
        open_source(server.url)


def test_the_budget_for_indexing(server: WebServer, shards: Path) -> None:
    size = sum(path.stat().st_size for path in shards.glob("*.tar"))
    with pytest.raises(ConfigError, match=r"3 shards have no index yet.*data\.index_budget.*vitssl index"):
        index_shards([f"{server.url}/train-{n:03}.tar" for n in range(3)], access=Access(index_budget=size - 1))
    assert server.bytes < 10_000 + 6 * 65536
    index_shards([f"{server.url}/train-{n:03}.tar" for n in range(3)], access=Access(index_budget=size))


def test_a_shard_that_changed(server: WebServer, shards: Path, write_tar: Callable, encoded: Callable) -> None:
    source = open_source(url(server))
    write_tar(shards / "train-001.tar", {f"{key}.png": encoded(key) for key in range(70)})
    raw = source.read([50])[0]
    assert not raw.image and re.search(r"had [\d,]+ when it was indexed; index it again", raw.problem) and raw.passing
    again = index_shards(source.manifest.shards, fresh=True)
    assert again.rows["samples"].tolist() == [40, 70, 37]


def test_a_manifest_that_does_not_fit_its_shards(server: WebServer, shards: Path, tmp_path: Path) -> None:
    open_source(shards)
    for path in shards.glob(f"*{SUFFIX}"):
        path.unlink()
    source = open_source(url(server))  # believed; the sidecar is made when its shard is first read
    assert source.read([3])[0].image
    head, _, rows = (shards / NAME).read_bytes().partition(b"\n")
    for bad in (b"{}", b"not json", head + b"\n" + rows[: len(rows) // 2], head + b"\n" + bytes(len(rows))):
        (shards / NAME).write_bytes(bad)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        assert open_source(url(server)).num_samples == 100


def test_hostile_sidecars(server: WebServer, shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    open_source(shards)
    path = shards / f"train-000.tar{SUFFIX}"
    line, _, content = path.read_bytes().partition(b"\n")
    width = len(content) // 40
    good = np.frombuffer(content, dtype=f"V{width}").copy()
    places = json.loads(line)["key_bytes"]
    for offset, length in ((-1, 10), (0, -1), (2**62, 10), (10**9, 10), (0, 2**40)):
        record = bytearray(good[3].tobytes())
        record[places : places + 16] = np.array([offset, length], dtype="<i8").tobytes()
        good_copy = good.copy()
        good_copy[3] = np.void(bytes(record))
        path.write_bytes(line + b"\n" + good_copy.tobytes())
        monkeypatch.setenv("VITSSL_CACHE", str(tmp_path / f"{offset}-{length}"))
        assert len(open_source(url(server)).read([3])[0].image) > 50, "it is made anew from the shard itself"


TROUBLE = {
    "gone": (["always 404"], r"is not there \(status 404\)", True),
    "forbidden": (["always 403"], r"is forbidden", True),
    "broken": (["always 500"], r"cannot be reached \(status 500", True),
}


@pytest.mark.parametrize("case", TROUBLE)
def test_training_goes_on_without_a_shard(server: WebServer, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    source = open_source(url(server))
    faults, words, passing = TROUBLE[case]
    server.faults = {"train-001.tar": faults}
    order = Order(source.chunks, seed=0)
    samples = Samples(source, order, [VIEW], seed=0, substitute=True)
    batch = samples.__getitems__(range(100))
    lost = {raw.key for raw in open_source(server.folder).read(range(40, 63))}
    assert {bad.key for bad in batch.bad} == lost and len(batch) == 100
    assert all(re.search(words, bad.reason) and bad.passing == passing for bad in batch.bad)
    assert not lost & {bad.served for bad in batch.bad}
    with pytest.raises(DataError, match=words):
        Samples(source, order, [VIEW], seed=0).__getitems__(range(100))


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 1), (1, 3), (2, 1), (2, 3)])
def test_the_same_run_with_any_loaders_and_each_byte_once(server: WebServer, shards: Path, world: int, workers: int) -> None:
    far, near = open_source(url(server)), open_source(shards)
    far.chunks = near.chunks = cut(near.manifest.rows["samples"], 2)
    far._chunk_starts = np.cumsum(far.chunks) - far.chunks
    order = Order(near.chunks, seed=1, lanes=6, window=4)
    server.requests.clear()
    options = {"start": 0, "stop": 84, "batch_size": 12, "micro_batch": 6, "world": world}
    for rank in range(world):
        samples = [Samples(source, order, [VIEW], seed=0) for source in (far, near)]
        mine, theirs = (
            list(batches(each, rank=rank, workers=count, **options)) for each, count in zip(samples, (workers, 0), strict=True)
        )
        assert len(mine) == len(theirs) == 84 // 6 // world
        for a, b in zip(mine, theirs, strict=True):
            assert a.positions.tolist() == b.positions.tolist() and a.keys == b.keys
            assert (a.views[VIEW] == b.views[VIEW]).all()
    asked = collections.Counter(each for each in server.requests if each[0].endswith(".tar"))
    assert sum(asked.values()) <= len(far.chunks) + 5, "a chunk that lies across the border of two lanes is theirs both"


def test_evaluation(server: WebServer, shards: Path) -> None:
    far, near = open_source(url(server)), open_source(shards)
    seen = []
    for rank in range(3):
        samples = Samples(far, Order(far.chunks, seed=0, lanes=1, shuffle=False), [VIEW], seed=0, labels=True)
        seen += [key for b in evaluation_batches(samples, batch_size=8, rank=rank, world=3, workers=rank % 2) for key in b.keys]
    assert sorted(seen) == sorted(raw.key for raw in near.read(range(100)))


def test_what_is_refused(server: WebServer, shards: Path) -> None:
    cases = {
        f"pipe:cat {shards}/train-000.tar": "data.allow_shell_urls=true",
        "PIPE:ls": "data.allow_shell_urls=true",
        "ftp://host/a.tar": "ftp:// is none of the places",
        "file:///a.tar": "file:// is none of the places",
    }
    for path, words in cases.items():
        with pytest.raises(ConfigError, match=words):
            open_source(path)
    with pytest.raises(ConfigError, match="some shards are local and some are not"):
        open_source([str(shards / "train-000.tar"), f"{server.url}/train-001.tar"])
    with pytest.raises(DataError, match=r"train-009\.tar: is not there"):
        open_source(f"{server.url}/train-009.tar")


def test_large_members_between_images_are_not_fetched(tmp_path: Path, write_tar: Callable, encoded: Callable) -> None:
    (tmp_path / "web").mkdir()
    members = {}
    for key in range(6):
        members |= {f"{key}.png": encoded(key), f"{key}.npy": bytes(2_000_000)}
    write_tar(tmp_path / "web/a.tar", members)
    with serving(tmp_path / "web") as server:
        source = open_source(f"{server.url}/a.tar")
        before = server.bytes
        assert [raw.image for raw in source.read(range(6))] == [encoded(key) for key in range(6)]
        assert server.bytes - before < 10_000


def test_members_beyond_all_measure(
    server: WebServer, shards: Path, photos: Path, encoded: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = len(encoded(7)) - 1  # some are larger
    sources = [open_source(url(server)), open_source(shards), open_source(photos)]
    for module in ("shards", "base"):
        monkeypatch.setattr(f"vitssl.data.sources.{module}.MAX_BYTES", limit)
    for source in sources:
        raws = source.read(range(source.num_samples))
        large = [raw for raw in raws if raw.problem]
        assert large and all(re.search(r"has [\d,]+ bytes, more than [\d,]+; take it out", raw.problem) for raw in large)
        assert all(len(raw.image) <= limit for raw in raws)


def test_shell_urls_where_they_are_allowed(shards: Path) -> None:
    source = open_source(f"pipe:cat {shards}/train-00{{0..2}}.tar", access=Access(shell=True))
    near = open_source(shards)
    assert source.fingerprint == near.fingerprint and source.read([99])[0].image == near.read([99])[0].image
    with pytest.raises(DataError, match=r"the command failed with code 3 \(no luck\)"):
        open_source("pipe:echo no luck >&2; exit 3", access=Access(shell=True))
