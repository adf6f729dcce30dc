"""Whole chunks in memory, fetched by threads before they are needed: for data where one sample costs as much as its chunk."""

import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from vitssl.errors import DataError

_FORGET = 60.0  # seconds after which a chunk that failed is tried again
_AHEAD = 4  # chunks a thread may have waiting for it


@dataclass
class _Entry:
    size: int  # bytes; until it is here, those that are expected
    future: Future = field(default_factory=Future)
    used: bool = False
    failed: float | None = None  # when


class ChunkBuffer:
    """``fetch(number)`` gives a chunk, ``size(chunk)`` its bytes, ``expected(number)`` those that it will about have.

    Used by one thread, filled by ``threads`` daemons.

    Beyond a limit the least recently used chunks go first, those that nobody used yet last. A failure to fetch is kept too, for
    a minute, and raised for each sample of its chunk without another try. In a forked child the buffer begins empty.
    """

    def __init__(
        self,
        fetch: Callable[[int], Any],
        *,
        size: Callable[[Any], int],
        expected: Callable[[int], int],
        threads: int = 16,
    ) -> None:
        self.fetch, self.size, self.expected, self.threads = fetch, size, expected, threads
        self.fetched = 0  # chunks, by this process
        self._process = -1

    def get(self, number: int, *, limit: int) -> Any:
        """A chunk, waiting for it where need be; at most ``limit`` bytes of others are kept beside it. Raises DataError."""
        self._begin()
        entry = self._entries.get(number)
        if entry is None or (entry.failed is not None and time.monotonic() - entry.failed > _FORGET):
            entry = self._start(number)
        try:
            chunk = entry.future.result()
        except DataError as error:
            raise type(error)(str(error)) from None  # each time a new one: the frames of an exception that is kept add up
        entry.used = True
        self._entries.move_to_end(number)
        self._make_room(limit, used_only=False)
        return chunk

    def expect(self, numbers: Iterable[int], *, limit: int) -> None:
        """Begin to fetch these chunks, in this order, as far as they fit beside those not used yet."""
        self._begin()
        for number in numbers:
            if number in self._entries:
                continue
            self._make_room(limit - (size := self.expected(number)), used_only=True)
            if self._waiting >= _AHEAD * self.threads or self._held + size > limit:
                return
            self._start(number)

    def _start(self, number: int) -> _Entry:
        old = self._entries.pop(number, None)
        entry = self._entries[number] = _Entry(self.expected(number))
        with self._lock:
            self._held += entry.size - (old.size if old else 0)
            self._waiting += 1
        self._orders.put((number, entry))
        return entry

    def _make_room(self, limit: int, *, used_only: bool) -> None:
        for number in list(self._entries)[:-1] if self._held > limit else ():
            entry = self._entries[number]
            if not entry.future.done() or (used_only and not entry.used):
                continue
            del self._entries[number]
            with self._lock:
                self._held -= entry.size
            if self._held <= limit:
                return

    def _begin(self) -> None:
        if self._process == os.getpid():
            return
        self._process, self._lock, self._orders = os.getpid(), threading.Lock(), queue.SimpleQueue()
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._held = self._waiting = 0
        for _ in range(self.threads):
            threading.Thread(target=self._work, args=(self._orders,), daemon=True, name="chunks").start()

    def _work(self, orders: queue.SimpleQueue) -> None:
        while True:
            number, entry = orders.get()
            try:
                chunk = self.fetch(number)
                size = self.size(chunk)
                with self._lock:
                    self._held += size - entry.size
                    entry.size = size
                    self._waiting -= 1
                    self.fetched += 1
                entry.future.set_result(chunk)
            except Exception as error:  # whatever it is, it is the asker's
                with self._lock:
                    self._held -= entry.size
                    entry.size = 0
                    self._waiting -= 1
                entry.failed = time.monotonic()
                entry.future.set_exception(error)

    def __getstate__(self) -> dict:
        kept = {name: vars(self)[name] for name in ("fetch", "size", "expected", "threads")}
        return kept | {"fetched": 0, "_process": -1}
