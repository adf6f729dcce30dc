"""Counts that somebody made before: they spare the indexing until a shard is read, and are checked then."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from webserver import WebServer, url

from vitssl.data.index import SUFFIX
from vitssl.data.manifest import NAME
from vitssl.data.sources import open_source
from vitssl.data.stores import Access
from vitssl.errors import ConfigError, DataError


@pytest.mark.parametrize("form", ["sizes.json", "wids", "wids by url"])
def test_counts_of_others_spare_the_indexing(shards: Path, server: WebServer, form: str) -> None:
    counts = {f"train-00{number}.tar": count for number, count in enumerate((40, 23, 37))}
    listed = [{"url": f"{server.url}/{name}" if "url" in form else name, "nsamples": count} for name, count in counts.items()]
    (shards / "sizes.json").write_text(json.dumps(counts))
    (shards / "index.json").write_text(json.dumps({"wids_version": 1, "shardlist": listed}))
    path = url(server) if form == "sizes.json" else f"{server.url}/index.json"
    if form != "sizes.json":
        (shards / "sizes.json").unlink()
    source = open_source(path, access=Access(index_budget=0))
    assert (source.num_samples, source.labels, source.num_unlabelled) == (100, False, 100)
    assert server.bytes < 5000, "nothing is read before it is needed"
    again = open_source(path, access=Access(index_budget=0))
    near = open_source(shards / "index.json" if form == "wids" else shards)
    assert again.fingerprint == source.fingerprint != near.fingerprint
    assert [raw.image for raw in source.read(range(100))] == [raw.image for raw in near.read(range(100))]


def test_counts_that_are_wrong(shards: Path, server: WebServer) -> None:
    (shards / "sizes.json").write_text(json.dumps({f"train-00{number}.tar": 40 for number in range(3)}))
    raws = open_source(url(server)).read(range(120))
    assert all(raw.image for raw in raws[:40])
    assert "train-001.tar: holds 23 samples, 40 were counted; correct the count" in raws[40].problem
    assert all(raw.problem and not raw.passing for raw in raws[40:])
    for content, words in {
        '{"a.tar": -1}': r"sizes\.json: is not JSON of file names and counts",
        "[1]": r"sizes\.json: is not JSON of file names and counts",
        "{": r"sizes\.json: is not JSON of file names and counts",
    }.items():
        (shards / "sizes.json").write_text(content)
        with pytest.raises(DataError, match=words):
            open_source(url(server))
    (shards / "sizes.json").unlink()
    for content, words in {
        '{"shardlist": []}': "its shardlist is empty",
        '{"shardlist": [{"url": "a.tar", "nsamples": 0}]}': "an nsamples that is no count",
        '{"shardlist": [{"url": "a.tar"}]}': "is no wids index",
        "{": "is no wids index",
    }.items():
        (shards / "index.json").write_text(content)
        for path in (f"{server.url}/index.json", str(shards / "index.json")):
            with pytest.raises(DataError, match=words):
                open_source(path)


def test_a_counted_shard_is_fetched_once_by_all_processes(shards: Path, server: WebServer) -> None:
    (shards / "sizes.json").write_text(json.dumps({f"train-00{n}.tar": count for n, count in enumerate((40, 23, 37))}))
    images = [raw.image for raw in open_source(shards).read(range(100))]
    for path in (shards / NAME, *shards.glob(f"*{SUFFIX}")):
        path.unlink()
    source = open_source(url(server), access=Access(index_budget=0))
    children = []
    for _ in range(4):
        if (child := os.fork()) == 0:
            good = [raw.image for raw in source.read(range(100))] == images
            os._exit(0 if good else 1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    whole = [path for path, said in server.requests if not said and path.endswith(".tar")]
    assert sorted(whole) == [f"train-00{number}.tar" for number in range(3)]


@pytest.mark.parametrize("names", [["train-000.tar"] * 2, ["train-000.tar?sig=1", "train-001.tar", "train-000.tar?sig=2"]])
def test_a_shard_twice_is_refused(shards: Path, server: WebServer, names: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"train-000\.tar: is listed 2 times .*data\.sources, with a weight"):
        open_source([f"{server.url}/{name}" for name in names])
    if "?" not in names[0]:
        with pytest.raises(ConfigError, match="is listed 2 times"):
            open_source([str(shards / name) for name in names])


def test_a_wids_index_that_lists_a_shard_twice_is_refused(shards: Path, server: WebServer) -> None:
    listed = [{"url": "train-000.tar", "nsamples": 40}, {"url": "train-000.tar?sig=1", "nsamples": 40}]
    (shards / "index.json").write_text(json.dumps({"shardlist": listed}))
    with pytest.raises(DataError, match=r"index\.json: lists http.*/train-000\.tar 2 times; list it once"):
        open_source(f"{server.url}/index.json?token=1")


@pytest.mark.parametrize("url", ["http://[::1/x.tar", "https://h:99999999/x.tar", "http://[bad]/x.tar", "https:///x.tar"])
def test_addresses_that_are_none(shards: Path, server: WebServer, url: str) -> None:
    (shards / "index.json").write_text(json.dumps({"shardlist": [{"url": url, "nsamples": 40}]}))
    with pytest.raises(DataError, match=r"index\.json: names .*, which is no web address; name the shards themselves"):
        open_source(f"{server.url}/index.json")


def test_a_damaged_counted_shard_is_fetched_once(shards: Path, server: WebServer) -> None:
    """Not once for each of its chunks."""
    content = (shards / "train-000.tar").read_bytes()
    (shards / "train-000.tar").write_bytes(content[: len(content) // 1024 * 512])
    (shards / "sizes.json").write_text(json.dumps({f"train-00{n}.tar": count for n, count in enumerate((40, 23, 37))}))
    source = open_source(url(server), access=Access(index_budget=0))
    source.recut(2)
    assert len(source.chunks) == int(np.ceil(40 / 2) + np.ceil(23 / 2) + np.ceil(37 / 2))
    raws = source.read(range(100))
    assert all("is truncated or damaged" in raw.problem and not raw.passing for raw in raws[:40])
    assert all(raw.image for raw in raws[40:])
    assert [said for path, said in server.requests if path == "train-000.tar"].count("") == 1
