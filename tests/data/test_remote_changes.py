"""Remote shards that change, lie, or are looked at: what is cached is theirs, and what they say is checked."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from webserver import WebServer, serving, url

from vitssl.data.index import SUFFIX
from vitssl.data.loader import evaluation_batches
from vitssl.data.manifest import NAME, index_shards, row_type
from vitssl.data.order import Order
from vitssl.data.samples import Samples
from vitssl.data.sources import open_source
from vitssl.data.sources.base import cut
from vitssl.data.stores import Access
from vitssl.errors import DataError
from vitssl.views import View

VIEW = View(size=(8, 8), scale=(0.3, 1.0))


def test_the_cache_holds_its_limit_and_knows_what_it_holds(
    server: WebServer, shards: Path, tmp_path: Path, write_tar: Callable
) -> None:
    """Also through the source: entries are far smaller than the limit, and shards change under their names."""
    access = Access(cache=tmp_path / "cache", cache_bytes=40_000)
    source = open_source(url(server), access=access)
    source.chunks = cut(source.manifest.rows["samples"], 2)
    source._chunk_starts = np.cumsum(source.chunks) - source.chunks
    before = [raw.image for raw in source.read(range(100))]
    assert (
        sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()) <= 80_000
    )  # of 128,000: sixteen threads write at once
    members = {f"{key:04d}.png": before[99 - key] for key in range(40)}
    for key in range(40):
        members[f"{key:04d}.cls"] = b"1"
    write_tar(shards / "train-000.tar", members)
    index_shards(source.manifest.shards, fresh=True)
    again = open_source(url(server), access=access)
    assert [raw.image for raw in again.read(range(40))] == [before[99 - key] for key in range(40)]


def test_a_server_without_ranges_whose_file_changes(shards: Path, write_tar: Callable, encoded: Callable) -> None:
    with serving(shards, ranges=False) as server:
        assert open_source(f"{server.url}/train-000.tar").read([0])[0].image == encoded(0)
        write_tar(shards / "train-000.tar", {f"{key}.png": encoded(key + 7) for key in range(60)})
        index_shards([f"{server.url}/train-000.tar"], fresh=True)
        source = open_source(f"{server.url}/train-000.tar")
        assert source.num_samples == 60 and source.read([0])[0].image == encoded(7)


@pytest.mark.parametrize("limit", [1000, 20_000])
def test_a_cache_smaller_than_its_shards(shards: Path, tmp_path: Path, limit: int) -> None:
    with serving(shards, ranges=False) as server:
        source = open_source(url(server), access=Access(cache=tmp_path / "cache", cache_bytes=limit))
        assert all(raw.image for raw in source.read(range(100))), "fetched again and again, but there"


def test_a_copy_of_another_shard_is_not_read(shards: Path, write_tar: Callable, encoded: Callable) -> None:
    """Of a server without ranges, whose file is another one by the time it is copied."""
    source = None
    with serving(shards) as server:
        source = open_source(f"{server.url}/train-000.tar")
        write_tar(shards / "train-000.tar", {f"{key:04d}.png": encoded(key + 7) for key in range(60)})
        server.ranges = False
        raws = source.read(range(40))
    assert not any(raw.image for raw in raws) and all(
        raw.passing and "changed since it was indexed" in raw.problem for raw in raws
    )


def test_manifests_that_lie(server: WebServer, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_source(shards)
    line, _, content = (shards / NAME).read_bytes().partition(b"\n")
    names = json.loads(line)["name_bytes"]

    def lie(number: int, column: str, value: object) -> None:
        rows = np.frombuffer(content, row_type(names)).copy()
        rows[column][number] = value
        (shards / NAME).write_bytes(line + b"\n" + rows.tobytes())
        monkeypatch.setenv("VITSSL_CACHE", str(tmp_path / f"{column}-{value!r}"[:40].replace("/", "_")))

    lie(0, "samples", 45)
    for path in (url(server), str(shards)):
        raws = open_source(path).read(range(105))
        assert all("holds 40 samples, 45 were counted; run  vitssl index  again" in raw.problem for raw in raws[:45])
        assert all(raw.image for raw in raws[45:])
    lie(1, "identity", b"\xff\xfe")
    raws = open_source(url(server)).read(range(100))
    assert all("changed since it was indexed" in raw.problem for raw in raws[40:63]) and all(raw.image for raw in raws[:40])
    for value in (2**62, -5):
        lie(2, "samples", value)
        assert open_source(url(server)).num_samples == 100, "what cannot be is not believed"


def test_hostile_words_about_shards(server: WebServer, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sidecars, manifests and counts of a server that means ill: made anew or refused in one line."""
    open_source(shards)
    sidecar, manifest = shards / f"train-000.tar{SUFFIX}", shards / NAME
    line, _, records = sidecar.read_bytes().partition(b"\n")
    head = json.loads(line)
    lies = [{"num_unlabelled": "x"}, {"ignored": 10**30}, {"num_unlabelled": 7}, {"key_bytes": -1}, {"num_samples": 10**15}]
    words = [json.dumps(head | lie).encode() + b"\n" + records for lie in lies] + [b"[" * 100_000]
    words.append(line + b"\n" + records.replace(b"png", b"\xff\xfe\xfd"))
    for number, content in enumerate(words):
        monkeypatch.setenv("VITSSL_CACHE", str(tmp_path / str(number)))
        sidecar.write_bytes(content)
        assert all(raw.image and raw.label is not None for raw in open_source(url(server)).read(range(40)))
    manifest.write_bytes(b"[" * 100_000)
    monkeypatch.setenv("VITSSL_CACHE", str(tmp_path / "manifest"))
    assert open_source(url(server)).num_samples == 100
    listed = {
        "[" * 100_000: "is no wids index",
        json.dumps({"shardlist": [{"url": "a.tar", "nsamples": 10**30}]}): "an nsamples that is no count",
        **{
            json.dumps({"shardlist": [{"url": named, "nsamples": 40}]}): words
            for named, words in {
                "/etc/a.tar": "names /etc/a.tar, which is a file of this machine",
                "https://10.0.0.1/a.tar": "which is a private address",
                "http://example.com/a.tar": "which is another host without https",
                "pipe:cat /etc/passwd": "which lies elsewhere",
                "s3://bucket/a.tar": "which lies elsewhere",
            }.items()
        },
    }
    for content, said in listed.items():
        (shards / "index.json").write_text(content)
        with pytest.raises(DataError, match=said):
            open_source(f"{server.url}/index.json")


def test_evaluation_reads_about_once(server: WebServer, shards: Path) -> None:
    source = open_source(url(server))
    source.chunks = cut(source.manifest.rows["samples"], 2)
    source._chunk_starts = np.cumsum(source.chunks) - source.chunks
    for workers in (0, 2):
        server.requests.clear()
        samples = Samples(
            pickle.loads(pickle.dumps(source)), Order(source.chunks, seed=0, lanes=1, shuffle=False), [VIEW], seed=0
        )
        assert sum(len(batch) for batch in evaluation_batches(samples, batch_size=10, workers=workers)) == 100
        assert sum(path.endswith(".tar") for path, _ in server.requests) <= len(source.chunks) + 10
