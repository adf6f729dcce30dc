"""Processes that compute the losses of one batch together."""

from collections.abc import Callable, Iterator

import pytest
from gang import Gang


@pytest.fixture(scope="session")
def gang() -> Iterator[Callable[[int], Gang]]:
    """A function of how many processes, 2 or 4."""
    gangs: dict[int, Gang] = {}
    yield lambda num: gangs.setdefault(num, None) or gangs.update({num: Gang(num)}) or gangs[num]
    for each in gangs.values():
        each.close()
