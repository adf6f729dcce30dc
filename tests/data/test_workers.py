"""Images that hang their loader process, or take it along: the process is lost, the run is not."""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vitssl.data import transforms, workers
from vitssl.data.loader import batches
from vitssl.data.order import Order
from vitssl.data.repeats import RepeatedOrder
from vitssl.data.samples import Samples
from vitssl.data.sources import open_source
from vitssl.errors import DataError
from vitssl.task import Batch
from vitssl.views import View

VIEW = View((8, 8), scale=(0.2, 1.0))


def hang() -> None:
    time.sleep(1000)


def crash() -> None:
    ctypes.string_at(0)  # a null pointer, as a broken decoder would follow it


CASES = {"hangs": (hang, "decoding did not end within 0.6 s"), "crashes": (crash, "decoding ended its process (SIGSEGV)")}


@pytest.fixture
def cursed(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """``cursed(what, keys)``: decoding an image of these keys does that."""
    real = transforms.decode
    monkeypatch.setattr(workers, "_LOOK", 0.2)

    def begin(what: Callable[[], None], keys: set[str]) -> None:
        def decode(raw, *rest, **options):
            if raw.key in keys:
                what()
            return real(raw, *rest, **options)

        monkeypatch.setattr(transforms, "decode", decode)

    return begin


def delivered(samples: Samples, *, count: int = 2) -> list[Batch]:
    return list(batches(samples, start=0, stop=96, batch_size=12, micro_batch=12, workers=count))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_the_run_goes_on_without_the_image(shards: Path, cursed: Callable, case: str, count: int) -> None:
    what, words = CASES[case]
    source = open_source(shards)
    samples = Samples(source, Order(source.chunks, seed=0), [VIEW], seed=0, substitute=True, patience=0.6)
    well = delivered(samples, count=0)
    keys = {well[2].keys[3], well[5].keys[0], well[5].keys[1]}
    cursed(what, keys)
    found = delivered(samples, count=count)
    assert [batch.keys for batch in found] == [batch.keys for batch in well]
    bad = [each for batch in found for each in batch.bad]
    assert {each.key for each in bad} == keys and not keys & {each.served for each in bad}
    for each in bad:
        assert each.passing and words in each.reason and each.key.partition("/")[2] in each.reason
    lost = {each.position for each in bad}
    for mine, theirs in zip(found, well, strict=True):
        rows = [row for row, position in enumerate(mine.positions.tolist()) if position not in lost]
        assert torch.equal(mine.views[VIEW][rows], theirs.views[VIEW][rows])


def test_also_where_its_substitute_hangs_and_where_it_stands_again(shards: Path, cursed: Callable) -> None:
    source = open_source(shards)
    order = RepeatedOrder(Order(source.chunks, seed=0), repeats=2, stride=12)
    samples = Samples(source, order, [VIEW], seed=0, substitute=True, patience=0.6)
    first = delivered(samples, count=0)[0].keys[0]
    cursed(crash, {first})
    (one, again) = (each for batch in delivered(samples, count=1) for each in batch.bad)
    assert (one.position, again.position) == (0, 12) and one.served != first != again.served
    cursed(crash, {first, one.served})
    (other, _) = (each for batch in delivered(samples, count=1) for each in batch.bad if each.key == first)
    assert other.served not in (first, one.served) and other.choice == one.choice + 1


def test_it_is_named_where_nothing_may_stand_in(shards: Path, cursed: Callable) -> None:
    source = open_source(shards)
    samples = Samples(source, Order(source.chunks, seed=0), [VIEW], seed=0, patience=0.6)
    cursed(hang, {delivered(samples, count=0)[1].keys[0]})
    with pytest.raises(DataError, match=r"00\d\d\.png \(byte .*\): decoding did not end within 0\.6 s; take it out"):
        delivered(samples)
