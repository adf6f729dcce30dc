"""Repeated sampling: each image at r positions, one decode for all of them, and the same run with any workers and processes."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitssl.config import build
from vitssl.data import transforms
from vitssl.data.feed import training_samples
from vitssl.data.loader import batches
from vitssl.data.order import Layout, Order
from vitssl.data.repeats import RepeatedOrder
from vitssl.data.sources import open_source
from vitssl.errors import ConfigError
from vitssl.sections import DataConfig
from vitssl.task import Batch
from vitssl.views import View

VIEWS = [View((8, 8), scale=(0.2, 1.0)), View((6, 6), scale=(0.2, 1.0), copy=1)]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 30), st.integers(1, 100), st.integers(0, 5))
def test_each_sample_stands_at_its_positions(repeats: int, stride: int, samples: int, seed: int) -> None:
    order = RepeatedOrder(Order([samples], seed=seed, lanes=1), repeats=repeats, stride=stride)
    blocks = 3
    ids = order.locate(np.arange(blocks * repeats * stride)).reshape(blocks, repeats, stride)
    assert (ids == ids[:, :1]).all(), "the same samples, stride after stride"
    assert ids[:, 0].ravel().tolist() == order.order.locate(np.arange(blocks * stride)).tolist(), "each block goes on"
    for position in range(blocks * repeats * stride):
        assert {order.locate([each])[0] for each in order.later(position)} <= {order.locate([position])[0]}
        assert len(order.later(position)) == repeats - 1 - position // stride % repeats


@pytest.fixture
def samples(shards: Path) -> Callable:
    """``samples(repeats_in)``: three views of each image, for batches of 12."""

    def make(where: str, **settings: object):
        config = build(DataConfig, {"repeats": 3, "repeats_in": where, **settings}, where="here")
        return training_samples(
            open_source(shards), config, VIEWS, seed=3, layouts=[Layout(6, config.window)], channels=3, batch_size=12
        )

    return make


def run(samples, *, world: int = 1, workers: int = 0, start: int = 0, micro_batch: int = 6) -> dict[int, tuple]:
    """Everything delivered, by position."""
    found = {}
    for rank in range(world):
        options = {"start": start, "stop": 144, "batch_size": 12, "micro_batch": micro_batch // world, "world": world}
        batch: Batch
        for batch in batches(samples, rank=rank, workers=workers, **options):
            for row, position in enumerate(batch.positions.tolist()):
                found[position] = (batch.keys[row], *(batch.views[view][row] for view in VIEWS))
    return found


def same(one: dict[int, tuple], two: dict[int, tuple]) -> bool:
    return one.keys() == two.keys() and all(
        a[0] == b[0] and all(map(torch.equal, a[1:], b[1:])) for a, b in ((one[key], two[key]) for key in one)
    )


@pytest.mark.parametrize("where", ["batch", "batches"])
def test_views_differ_and_the_run_is_the_same_for_all(samples: Callable, where: str) -> None:
    found = run(samples(where))
    assert sorted(found) == list(range(144))
    assert set(Counter(key for key, *_ in found.values()).values()) == {3}
    stride = {"batch": 4, "batches": 12}[where]
    for view in (1, 2):
        assert not torch.equal(found[0][view], found[stride][view]) and found[0][0] == found[stride][0]
    for options in ({"workers": 1}, {"workers": 3}, {"world": 2}, {"world": 2, "workers": 2}, {"world": 3, "workers": 1}):
        assert same(run(samples(where), **options), found), options
    later = run(samples(where), start=60, workers=2)
    assert same(later, {position: each for position, each in found.items() if position >= 60})


@pytest.mark.parametrize(("where", "world"), [("batch", 1), ("batches", 1), ("batch", 2), ("batches", 2), ("batch", 4)])
def test_one_decode_serves_all(samples: Callable, monkeypatch: pytest.MonkeyPatch, where: str, world: int) -> None:
    decoded: list[str] = []
    real = transforms.decode
    monkeypatch.setattr(transforms, "decode", lambda raw, *rest, **more: (decoded.append(raw.key), real(raw, *rest, **more))[1])
    run(samples(where), world=world, micro_batch=12)
    assert len(decoded) == 48 and len(set(decoded)) == 48


def test_a_batch_that_does_not_divide(samples: Callable) -> None:
    with pytest.raises(ConfigError, match=r"data\.repeats=5 does not divide batch_size=12; take another, or data\.repeats_in"):
        samples("batch", repeats=5)
    assert samples("batches", repeats=5).order.stride == 12
