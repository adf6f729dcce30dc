"""Two workers share the tests (see pyproject.toml), so each computes with one thread; what they start does so too."""

import os
from collections.abc import Callable, Iterator
from functools import cache

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch

from gang import Gang


@pytest.fixture(scope="session")
def gang() -> Iterator[Callable[[int], Gang]]:
    """A function of how many (2 or 4) -> processes that compute the losses of one batch together."""
    begun: list[Gang] = []

    @cache
    def gathered(num: int) -> Gang:
        begun.append(Gang(num))
        return begun[-1]

    yield gathered
    for each in begun:
        each.close()
