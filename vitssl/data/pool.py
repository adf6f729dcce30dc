"""Work on many shards or images side by side."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

FROM = 4  # tasks from which starting processes pays


def side_by_side(work: Callable[[Any], Any], tasks: Sequence[Any], processes: int) -> Iterator[Any]:
    """``work(task)`` of every task, in order; in this process where they are few. Ctrl-C reaches this process only.

    Children are forked: they only read, decode and write, and starting afresh would import the program again.
    """
    if processes <= 1 or len(tasks) < FROM:
        yield from map(work, tasks)
        return
    ignore_interrupt = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(processes, len(tasks)), mp_context=context, initializer=ignore_interrupt) as pool:
        yield from pool.map(work, tasks)
