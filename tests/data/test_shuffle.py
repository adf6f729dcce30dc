"""How well a run is mixed, on shards that are sorted by class: beside webdataset's shards in random order with a buffer of the
memory that lanes x window would take if they were buffered."""

import random

import numpy as np
import pytest
import webdataset

from vitssl.data.order import Order, default_chunk
from vitssl.data.sources.base import cut

SHARDS, EACH, BATCH = 50, 1000, 256


def quality(ids: np.ndarray) -> tuple[float, float]:
    """(share of neighbours from one shard, mean number of shards in a batch)."""
    shard = ids // EACH
    batches = shard[: len(shard) // BATCH * BATCH].reshape(-1, BATCH)
    return float(np.mean(shard[1:] == shard[:-1])), float(np.mean([len(np.unique(batch)) for batch in batches]))


def buffered(size: int) -> np.ndarray:
    rng = random.Random(0)
    shards = list(range(SHARDS))
    rng.shuffle(shards)
    stream = (number for shard in shards for number in range(shard * EACH, shard * EACH + EACH))
    return np.array(list(webdataset.shuffle(size, initial=size, rng=rng)(stream)))


@pytest.mark.parametrize("window", [16, 128, 1024])
def test_it_is_mixed_better_than_by_a_buffer_of_the_same_memory(window: int) -> None:
    chunks = cut(np.full(SHARDS, EACH), default_chunk(SHARDS * EACH))
    order = Order(chunks, seed=1, lanes=24, window=window)
    ids = order.locate(np.arange(SHARDS * EACH))
    assert np.array_equal(np.sort(ids), np.arange(SHARDS * EACH))
    ours, theirs = quality(ids), quality(buffered(min(24 * window, SHARDS * EACH)))
    assert ours[0] <= theirs[0] and ours[1] >= theirs[1], (ours, theirs)
    perfect = quality(np.random.default_rng(0).permutation(SHARDS * EACH))
    assert ours[0] < 1.3 * perfect[0] and ours[1] > 0.5 * perfect[1]
