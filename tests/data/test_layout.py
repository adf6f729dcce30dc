"""How an order is laid out: lanes and windows that memory has room for, whole lanes to each process, and what is recorded."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from webserver import WebServer, url

from vitssl import dist
from vitssl.config import build
from vitssl.data.feed import training_samples
from vitssl.data.layout import choose_layouts, choose_window, costs, whole_lanes
from vitssl.data.manifest import index_shards
from vitssl.data.order import Layout, default_chunk, default_lanes
from vitssl.data.sources import open_source, same_samples
from vitssl.data.stores import Access
from vitssl.plan import Plan
from vitssl.sections import DataConfig

MIB = 1 << 20


@pytest.mark.parametrize(
    ("samples", "loaders", "lanes"),
    [
        (1, 1, 1), (999, 1, 1), (2000, 1, 2), (60_000, 16, 60), (10**6, 1, 240), (10**9, 60, 240),  # the data alone
        (10**9, 61, 360), (10**9, 512, 2520), (10**9, 2000, 10080), (10**9, 10**6, 10080), (300_000, 512, 240), (5000, 512, 4),
    ],
)  # fmt: skip
def test_lanes(samples: int, loaders: int, lanes: int) -> None:
    assert default_lanes(samples, loaders) == lanes
    assert lanes <= max(1, samples / 1000) and (lanes >= 4 * loaders or lanes * 2 > samples / 1000 or loaders > 2520)


@pytest.mark.parametrize(
    ("samples", "mean", "chunk"),
    [
        (10**6, None, 16),
        (10**9, None, 500),
        (10**6, 110_000, 9),
        (10**6, 2_000, 524),
        (10**6, 5 * MIB, 1),
        (10**9, 110_000, 500),
    ],
)
def test_chunks_of_remote_data_are_about_a_mebibyte(samples: int, mean: int | None, chunk: int) -> None:
    assert default_chunk(samples, mean) == chunk


def far(mean: int, chunk: int) -> SimpleNamespace:
    return SimpleNamespace(by_chunk=True, mean_bytes=mean, chunks=np.full(1000, chunk))


@pytest.mark.parametrize(("mean", "chunk", "lanes"), [(110_000, 9, 60), (2_000, 524, 24), (400_000, 2, 240), (110_000, 9, 240)])
def test_a_window_fits_the_memory(mean: int, chunk: int, lanes: int) -> None:
    memory = 1024 * MIB
    window = choose_window(far(mean, chunk), 1024, lanes=lanes, memory=memory)
    assert 1 <= window <= 1024
    held = lanes * (1.5 * window + 2 * chunk) * mean  # the window, what is read ahead of it, and the chunks at its ends
    assert held <= memory or window == 1
    assert window == 1024 or lanes * (1.5 * (window + 1) + 2 * chunk) * mean > memory
    assert choose_window(SimpleNamespace(by_chunk=False), 1024, lanes=lanes, memory=1) == 1024


@pytest.mark.parametrize(
    ("chosen", "asked", "world", "lanes", "expected"),
    [
        (7, None, 1, 24, (6, 1)),  # fewer workers, each with lanes of its own
        (7, None, 8, 240, (6, 1)),
        (3, None, 5, 24, (3, 5)),  # five processes never divide 24 lanes: told, not hidden
        (7, 7, 1, 24, (7, 7)),  # the user's number stays
        (8, 8, 1, 24, (8, 1)),
        (0, 0, 2, 24, (0, 1)),
        (5, 5, 2, 4, (5, 5)),
    ],
)
def test_whole_lanes(monkeypatch: pytest.MonkeyPatch, chosen, asked, world, lanes, expected) -> None:
    monkeypatch.setattr(dist, "world", lambda: world)
    config = build(DataConfig, {"workers": asked}, where="here")
    assert whole_lanes(far(1000, 16), config, lanes=[lanes], workers=chosen) == expected
    assert whole_lanes(SimpleNamespace(by_chunk=False), config, lanes=[lanes], workers=chosen) == (chosen, 1)


def test_the_plan_says_what_is_read_twice() -> None:
    values = dict.fromkeys(Plan.__dataclass_fields__, 1) | {
        "layouts": [[24, 512, 9]],
        "costs": [],
        "workers": 7,
        "parameters": {},
        "memory": {},
        "waits": {},
    }
    values |= {"lr_rule": "", "engine": "ddp", "precision": "fp32", "device": "cpu"}
    told = dict(Plan(**values | {"readers": 7}).lines())["data"]
    assert told.endswith("24 lanes, 7 loader processes each, 7 of which read each byte"), json.dumps(told)
    assert dict(Plan(**values | {"readers": 1}).lines())["data"].endswith("7 loader processes each")


@pytest.mark.parametrize(
    ("chunk_mib", "memory", "lanes"),
    [(1, 1.0, 240), (2, 1.0, 120), (100, 1.0, 2), (100, 8.0, 12), (3000, 1.0, 1)],
)
def test_lanes_are_those_that_memory_has_room_for(chunk_mib: int, memory: float, lanes: int) -> None:
    source = far(chunk_mib * MIB // 1000, 1000)
    source.num_samples = 1_000_000
    config = build(DataConfig, {"memory": memory}, where="here")
    (layout,) = choose_layouts(source, config)
    assert layout.lanes == lanes and layout.window >= 1
    assert bool(costs(source, config, [layout])) == (2 * lanes * chunk_mib > 1024 * memory)
    forced = build(DataConfig, {"memory": memory, "lanes": 600}, where="here")
    (told,) = costs(source, forced, choose_layouts(source, forced))
    needed = -(-2 * 600 * source.mean_bytes * 1000 // 2**30)
    assert costs(source, config, [Layout(1, 1)], readers=3)[0].startswith("3 loader processes fetch each byte: name data.cache")
    cached = build(DataConfig, {"memory": memory, "cache": "/here"}, where="here")
    assert costs(source, cached, [Layout(1, 1)], readers=3) == costs(source, config, [Layout(1, 1)])
    assert told.startswith("600 lanes of chunks of up to") and f"data.memory={needed} or fewer data.lanes" in told


def test_a_run_on_counted_shards_keeps_its_order_once_indexed(server: WebServer, shards: Path) -> None:
    """Their mean size is a guess from a few of them, so another guess would be another order."""
    (shards / "sizes.json").write_text(json.dumps({f"train-00{n}.tar": count for n, count in enumerate((40, 23, 37))}))
    counted = open_source(url(server), access=Access(index_budget=0))
    counted.recut(7)  # what the guess was then
    layouts = choose_layouts(counted, config := DataConfig())
    assert layouts == [Layout(1, 1024, 7)]
    (told,) = costs(counted, config, layouts)
    assert told.startswith("3 shards are counted and not indexed: each is read whole, once more")
    index_shards(counted.manifest.shards, fresh=True)
    indexed = open_source(url(server))
    assert indexed.chunk != 7 and not costs(indexed, config, layouts)
    orders = [
        training_samples(source, config, [], seed=3, layouts=layouts, channels=3).order.locate(range(250))
        for source in (counted, indexed)
    ]
    assert (orders[0] == orders[1]).all() and indexed.read([99])[0].image
    assert same_samples(counted.fingerprint, indexed.fingerprint) and same_samples(indexed.fingerprint, counted.fingerprint)
    assert same_samples(open_source(shards).fingerprint, counted.fingerprint)


def test_fingerprints_compare() -> None:
    table = [
        ("a.1", "a.2", True),  # the same bytes under other names
        ("a.1", "b.1", False),
        ("unread.1", "b.1", True),
        ("unread.1", "b.2", False),
        ("unread.1", "unread.1", True),
        ("a.1+unread.2", "a.3+c.2", True),
        ("a.1+unread.2", "a.3", False),
        ("abc", "abc", True),
        ("abc", "abd", False),
    ]
    for then, now, same in table:
        assert same_samples(then, now) == same_samples(now, then) == same, (then, now)
