"""Mixtures of sources: exact counts in every block, each source in its own order and epochs, whoever asks when."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitssl.config import build
from vitssl.data.feed import open_configured, training_samples
from vitssl.data.layout import choose_layouts
from vitssl.data.mixing import BLOCK, MixedOrder
from vitssl.data.order import Layout, Order
from vitssl.data.sources import Joined, open_source
from vitssl.errors import ConfigError, DataError
from vitssl.sections import DataConfig
from vitssl.views import View


def mixed(sizes: list[int], weights: list[float], seed: int = 3) -> MixedOrder:
    orders = [Order([size], seed=seed + number, lanes=1, window=16) for number, size in enumerate(sizes)]
    return MixedOrder(orders, weights, seed=seed)


sources = st.lists(st.tuples(st.integers(1, 60), st.floats(0.05, 10)), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(sources, st.integers(0, 3000), st.integers(0, 10**6))
def test_blocks_hold_exact_counts_and_each_source_runs_through_its_own_epochs(parts: list, first: int, seed: int) -> None:
    sizes, weights = [size for size, _ in parts], [weight for _, weight in parts]
    order = mixed(sizes, weights, seed)
    positions = np.arange(first * BLOCK, (first + 3) * BLOCK)
    ids = order.locate(positions)
    owner = np.searchsorted(np.cumsum(sizes), ids, side="right")
    shares = BLOCK * np.array(weights) / sum(weights)
    for block in owner.reshape(3, BLOCK):
        counts = np.bincount(block, minlength=len(sizes))
        assert (np.floor(shares - 1e-9) <= counts).all() and (counts <= np.ceil(shares + 1e-9)).all()
    starts = np.cumsum([0, *sizes[:-1]])
    for number, own in enumerate(order.orders):  # its samples are the next ones of its own order, none twice, none left out
        before = int(order.counts(first * BLOCK)[number])
        told = ids[owner == number] - starts[number]
        assert told.tolist() == own.locate(np.arange(before, before + len(told))).tolist()
    some = np.random.default_rng(seed).permutation(positions)[:70]
    assert order.locate(some).tolist() == ids[some - positions[0]].tolist()  # whoever asks, in whichever order


def test_weights_in_hundredths_are_exact_in_every_block_and_places_are_spread() -> None:
    order = mixed([1000, 1000, 1000], [70, 25, 5])
    owner = order.locate(np.arange(200 * BLOCK)) // 1000
    assert (np.stack([np.bincount(block, minlength=3) for block in owner.reshape(200, BLOCK)]) == [70, 25, 5]).all()
    for process in range(4):  # of four, each sees all three, in their shares
        counts = np.bincount(owner[process::4], minlength=3) / (50 * BLOCK)
        assert np.allclose(counts, [0.7, 0.25, 0.05], atol=0.02)


def test_counts_come_near_any_weights() -> None:
    weights = np.array([1.0, np.pi, 0.01])
    found = mixed([10, 10, 10], weights.tolist()).counts(10_240_000 * BLOCK) / (10_240_000 * BLOCK)
    assert np.allclose(found, weights / weights.sum(), atol=1e-5)


def test_a_weight_of_next_to_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.sources.1: a weight of 1e-06 among 1 is less than one of 102,400 samples"):
        mixed([5, 5], [1.0, 1e-6])


def test_a_mixture_of_configured_sources(shards: Path, classes: Callable, tmp_path: Path, write_tar: Callable, encoded) -> None:
    write_tar(tmp_path / "more.tar", {f"{number}.png": encoded(500 + number) for number in range(7)})
    values = {"sources": [{"path": str(shards), "weight": 3}, {"path": str(tmp_path / "more.tar")}], "lanes": 2}
    config = build(DataConfig, values, where="here")
    source = open_configured(config, key="data")
    assert isinstance(source, Joined) and source.num_samples == 107 and not source.labels and source.label_array() is None
    raws = source.read([106, 0, 100, 99])
    assert [raw.key for raw in raws] == ["1:more.tar/6", "0:train-000.tar/0000", "1:more.tar/0", "0:train-002.tar/0099"]
    layouts = choose_layouts(source, config)
    assert [each.lanes for each in layouts] == [2, 2]
    samples = training_samples(source, config, [View((8, 8))], seed=1, layouts=layouts, channels=3)
    batch = samples.__getitems__(range(400))
    assert sum(key.startswith("0:") for key in batch.keys) == 300
    assert len(set(batch.keys[:130])) > 90  # 98 of the one, all 7 of the other
    with pytest.raises(ConfigError, match=r"data.path and data.sources are both given"):
        open_configured(build(DataConfig, values | {"path": "x"}, where="here"), key="data")
    with pytest.raises(DataError, match=r"data.sources.1: .*none.tar: nothing is there"):
        sources = [values["sources"][0], {"path": str(tmp_path / "none.tar")}]
        open_configured(build(DataConfig, {"sources": sources}, where="here"), key="data")
    with pytest.raises(ConfigError, match=r"sources.0.wieght: unknown key"):
        build(DataConfig, {"sources": [{"path": "x", "wieght": 2}]}, where="here")


def test_labels_of_joined_sources_are_the_first_ones(classes: Callable, shards: Path) -> None:
    joined = Joined([classes("a", "b", "c"), classes("b", "c")], [1, 1])
    assert joined.classes == ("a", "b", "c") and joined.label_array().tolist() == [0, 0, 1, 1, 2, 2, 1, 1, 2, 2]
    assert [raw.label for raw in joined.read([6, 0])] == [1, 0]
    with pytest.raises(DataError, match="classes are not among those of"):
        Joined([classes("b", "d"), classes("a", "e")], [1, 1])
    assert open_source(shards).label_array() is not None


def test_loaders_of_a_mixture_divide_its_memory(classes: Callable) -> None:
    source = Joined([classes("a", "b"), classes("b", "a")], [1, 2])
    samples = training_samples(
        source, DataConfig(memory=1.0), [View((8, 8))], seed=1, layouts=[Layout(2, 1024)] * 2, channels=3
    )
    assert samples.memory == 1 << 30 and samples.among(4, 8).memory == (1 << 30) // 32
