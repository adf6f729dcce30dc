"""What the machine and the data decide about lanes, windows and workers."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from vitssl import dist
from vitssl.config import build
from vitssl.data.feed import choose_window, whole_lanes
from vitssl.data.order import default_chunk, default_lanes
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
    values = dict.fromkeys(Plan.__dataclass_fields__, 1) | {"lanes": [24], "workers": 7, "parameters": {}, "memory": {}}
    values |= {"lr_rule": "", "engine": "ddp", "precision": "fp32", "device": "cpu"}
    told = dict(Plan(**values | {"readers": 7}).lines())["data"]
    assert told.endswith("24 lanes, 7 loader processes each, 7 of which read each byte"), json.dumps(told)
    assert dict(Plan(**values | {"readers": 1}).lines())["data"].endswith("7 loader processes each")
