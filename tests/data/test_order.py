"""Every sample exactly once an epoch, whatever the chunks, lanes and windows, and however positions are asked for."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitssl import draws
from vitssl.data.order import Order, default_chunk, default_lanes
from vitssl.views import purpose

CASES = st.fixed_dictionaries(
    {
        "chunks": st.lists(st.integers(1, 40), min_size=1, max_size=30),
        "lanes": st.integers(1, 24),
        "window": st.integers(1, 70),
        "seed": st.integers(0, 2**63 - 1),
    }
)


def make(chunks: list[int], *, lanes: int, window: int, seed: int) -> Order:
    return Order(chunks, lanes=min(lanes, sum(chunks)), window=window, seed=seed)


def slow(order: Order, position: int) -> int:
    """The definition, one position at a time in plain Python: the oracle of ``Order.locate``."""
    counts, num, lanes = order.chunks.tolist(), order.num_samples, order.lanes
    epoch, row = divmod(position, num)
    firsts = np.cumsum([0, *counts]).tolist()
    chunk_order = draws.permutation(order.seed, draws.fold(purpose("order of chunks"), epoch), len(counts)).tolist()
    line = [firsts[chunk] + place for chunk in chunk_order for place in range(counts[chunk])]
    sizes = [num // lanes + (lane < num % lanes) for lane in range(lanes)]
    lane, place = row % lanes, row // lanes
    first = sum(sizes[:lane]) + place // order.window * order.window
    last = min(first + order.window, sum(sizes[: lane + 1]))
    keys = {
        at: int(draws.hashed(order.seed, draws.fold(purpose("order of samples"), epoch), draws.torch.tensor([at]), 1))
        for at in range(first, last)
    }
    return line[sorted(keys, key=keys.__getitem__)[place % order.window]]


@settings(max_examples=60, deadline=None)
@given(case=CASES, epoch=st.integers(0, 10**6))
def test_each_epoch_maps_one_to_one_onto_all_samples(case: dict, epoch: int) -> None:
    order = make(**case)
    num = order.num_samples
    ids = order.locate(np.arange(epoch * num, (epoch + 1) * num))
    assert ids.dtype == np.int64
    assert np.array_equal(np.sort(ids), np.arange(num))


@settings(max_examples=40, deadline=None)
@given(case=CASES, data=st.data())
def test_locate_is_the_definition_however_positions_are_asked(case: dict, data: st.DataObject) -> None:
    order = make(**case)
    positions = data.draw(st.lists(st.integers(0, 4 * order.num_samples), min_size=1, max_size=12))
    expected = [slow(order, position) for position in positions]
    assert order.locate(positions).tolist() == expected
    assert [int(order.locate([position])[0]) for position in reversed(positions)] == expected[::-1]


@settings(max_examples=40, deadline=None)
@given(case=CASES, batch=st.integers(1, 50), start=st.integers(0, 500))
def test_batches_that_cross_the_border_lose_and_repeat_nothing(case: dict, batch: int, start: int) -> None:
    before, after = make(**case), make(**case)  # a run that stops at ``start``, and the one that goes on from there
    start, stop = start % before.num_samples, 3 * before.num_samples
    ids = [before.locate(np.arange(start))]
    ids += [after.locate(np.arange(first, min(first + batch, stop))) for first in range(start, stop, batch)]
    assert (np.bincount(np.concatenate(ids), minlength=before.num_samples) == 3).all()


@settings(max_examples=30, deadline=None)
@given(case=CASES)
def test_lanes_are_segments_of_the_line_that_differ_by_at_most_one_sample(case: dict) -> None:
    order = make(**case)
    ids = order.locate(np.arange(order.num_samples))
    chunk_order = draws.permutation(order.seed, draws.fold(purpose("order of chunks"), 0), len(order.chunks)).numpy()
    first = np.cumsum(order.chunks) - order.chunks
    line = np.concatenate([np.arange(first[chunk], first[chunk] + order.chunks[chunk]) for chunk in chunk_order])
    at = np.empty_like(line)
    at[line] = np.arange(len(line))
    reached, sizes = 0, []
    for lane in range(order.lanes):
        places = np.sort(at[ids[lane :: order.lanes]])
        assert np.array_equal(places, np.arange(reached, reached + len(places)))
        reached += len(places)
        sizes.append(len(places))
    assert max(sizes) - min(sizes) <= 1


def test_epochs_and_seeds_differ_and_samples_spread() -> None:
    order = Order([16] * 400, seed=3, lanes=6)
    first, second = order.locate(np.arange(6400)), order.locate(np.arange(6400, 12800))
    assert (first == second).mean() < 0.01
    assert (first == Order([16] * 400, seed=4, lanes=6).locate(np.arange(6400))).mean() < 0.01
    same_chunk = np.mean(first[1:] // 16 == first[:-1] // 16)
    assert same_chunk < 0.02  # neighbours come from different lanes, so hardly ever from one chunk


def test_without_shuffle_it_is_the_identity_epoch_after_epoch() -> None:
    order = Order([3, 4], seed=0, shuffle=False)
    assert order.locate(np.arange(16)).tolist() == [*range(7), *range(7), 0, 1]


def test_pickles_without_its_caches_and_goes_on_the_same() -> None:
    order = Order([16] * 1000, seed=5, lanes=12)
    small = len(pickle.dumps(order))
    expected = order.locate(np.arange(20_000))
    assert len(pickle.dumps(order)) == small
    assert np.array_equal(pickle.loads(pickle.dumps(order)).locate(np.arange(20_000)), expected)


def test_caches_stay_bounded() -> None:
    order = Order([16] * 20, seed=5, lanes=4, window=10)
    order.locate(np.arange(20 * order.num_samples))
    assert len(order._epochs) <= 2 and len(order._windows) <= 4


@pytest.mark.parametrize(("samples", "lanes"), [(1, 1), (1999, 1), (2000, 2), (12_000, 12), (50_000, 24), (10**9, 240)])
def test_default_lanes_depend_on_the_data_alone(samples: int, lanes: int) -> None:
    assert default_lanes(samples) == lanes


@pytest.mark.parametrize(("samples", "size"), [(1, 16), (32_000_000, 16), (32_000_001, 17), (10**9, 500)])
def test_chunks_grow_so_that_there_are_at_most_two_million(samples: int, size: int) -> None:
    assert default_chunk(samples) == size
    assert -(-samples // size) <= 2_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"chunks": []}, "at least one chunk"), ({"chunks": [0, 3]}, "each chunk at least one sample"),
     ({"chunks": [3], "lanes": 4}, "4 lanes with windows of 1024 do"), ({"chunks": [3], "window": 0}, "windows of 0")],
)  # fmt: skip
def test_refuses_what_cannot_be_ordered(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Order(seed=0, **arguments)
