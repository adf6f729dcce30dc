"""Chunks in memory: fetched once, ahead of need, within a limit; failures belong to who asks."""

import os
import threading
import time
from collections import Counter

import numpy as np
import pytest

from vitssl.data import buffer
from vitssl.data.buffer import ChunkBuffer
from vitssl.errors import DataError

SIZE = 100


class Store:
    """Chunks of 100 bytes; counts what was asked for, and fails where it is told to."""

    def __init__(self) -> None:
        self.asked: Counter[int] = Counter()
        self.broken: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()

    def fetch(self, number: int) -> bytes:
        self.asked[number] += 1
        self.gate.wait(10)
        if number in self.broken:
            raise DataError(f"chunk {number} is broken")
        return bytes([number]) * SIZE


@pytest.fixture
def store() -> Store:
    return Store()


def held(chunks: ChunkBuffer) -> int:
    return sum(entry.size for entry in chunks._entries.values())


def test_each_chunk_is_fetched_once(store: Store) -> None:
    chunks = ChunkBuffer(store.fetch, size=len, expected=lambda number: SIZE, threads=4)
    for numbers in (range(8), range(4, 12)):
        chunks.expect(numbers, limit=10**6)
        assert [chunks.get(number, limit=10**6)[0] for number in numbers] == list(numbers)
    assert set(store.asked.values()) == {1} and chunks.fetched == 12


def test_the_limit_holds_whatever_is_asked(store: Store) -> None:
    chunks, draw = ChunkBuffer(store.fetch, size=len, expected=lambda number: SIZE, threads=4), np.random.default_rng(0)
    for _ in range(200):
        chunks.expect(draw.integers(0, 50, 5).tolist(), limit=10 * SIZE)
        number = int(draw.integers(0, 50))
        assert chunks.get(number, limit=10 * SIZE) == bytes([number]) * SIZE
        assert held(chunks) <= (10 + 1) * SIZE
    assert chunks.get(0, limit=0)[0] == 0 and held(chunks) <= SIZE + 4 * SIZE  # what is under way cannot be dropped


def test_what_is_expected_outlives_what_was_used(store: Store) -> None:
    chunks = ChunkBuffer(store.fetch, size=len, expected=lambda number: SIZE, threads=2)
    for number in range(5):
        chunks.get(number, limit=6 * SIZE)
    chunks.expect([10, 11, 12, 13], limit=6 * SIZE)
    deadline = time.monotonic() + 5
    while chunks._waiting and time.monotonic() < deadline:
        time.sleep(0.01)
    for number in (20, 21):
        chunks.get(number, limit=6 * SIZE)
    store.asked.clear()
    for number in (10, 11, 12, 13):
        chunks.get(number, limit=6 * SIZE)
    assert not store.asked


def test_expecting_does_not_wait(store: Store) -> None:
    chunks = ChunkBuffer(store.fetch, size=len, expected=lambda number: SIZE, threads=2)
    store.gate.clear()
    before = time.monotonic()
    chunks.expect(range(100), limit=10**6)
    assert time.monotonic() - before < 1 and len(chunks._entries) == 8  # four for each thread
    store.gate.set()
    assert chunks.get(99, limit=10**6)[0] == 99


def test_no_more_is_ordered_than_fits(store: Store) -> None:
    """Before the first is here nobody knows how large they are, so what is expected counts."""
    chunks = ChunkBuffer(store.fetch, size=len, expected=lambda number: SIZE, threads=4)
    store.gate.clear()
    chunks.expect(range(100), limit=3 * SIZE)
    assert len(chunks._entries) == 3 and chunks._held == 3 * SIZE
    store.gate.set()
    assert [chunks.get(number, limit=3 * SIZE)[0] for number in range(3)] == [0, 1, 2] and chunks._held == 3 * SIZE
    store.broken = {7}
    with pytest.raises(DataError):
        chunks.get(7, limit=3 * SIZE)
    assert chunks._held == 3 * SIZE, "what failed holds nothing"


def test_a_failure_is_told_to_each_and_tried_again_later(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = ChunkBuffer(store.fetch, size=len, expected=lambda number: SIZE, threads=2)
    store.broken = {3}
    chunks.expect([3], limit=10**6)
    for _ in range(5):
        with pytest.raises(DataError, match="chunk 3 is broken"):
            chunks.get(3, limit=10**6)
    assert store.asked[3] == 1
    store.broken = set()
    monkeypatch.setattr(buffer, "_FORGET", -1.0)
    assert chunks.get(3, limit=10**6)[0] == 3


def test_a_fork_begins_empty(store: Store) -> None:
    chunks = ChunkBuffer(store.fetch, size=len, expected=lambda number: SIZE, threads=2)
    chunks.get(1, limit=10**6)
    if (child := os.fork()) == 0:
        good = chunks.get(1, limit=10**6)[0] == 1 and chunks.get(2, limit=10**6)[0] == 2 and store.asked[1] == 2
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert chunks.get(1, limit=10**6)[0] == 1 and store.asked == {1: 1}
