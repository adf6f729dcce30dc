"""The same batches from any number of workers and processes, every sample once in evaluation, errors that arrive whole."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitssl.data.loader import batches, evaluation_batches
from vitssl.data.order import Order
from vitssl.data.samples import Samples
from vitssl.data.sources import ShardSource, Source, open_source
from vitssl.data.transforms import crop_box, decode, draw_numbers
from vitssl.errors import ConfigError, DataError
from vitssl.task import Batch
from vitssl.views import View

CROP = View((8, 6), scale=(0.2, 1.0), flip=0.5)
TWIN = View((8, 6), scale=(0.2, 1.0), flip=0.5, copy=1)
WHOLE = View((10, 12))


def make(source: Source, views: tuple[View, ...] = (CROP,), *, shuffle: bool = True, **options: object) -> Samples:
    order = Order(source.chunks, seed=5, lanes=4, window=8, shuffle=shuffle)
    return Samples(source, order, views, seed=5, labels=options.pop("labels", True), **options)


def same(one: Batch, other: Batch) -> bool:
    return (
        one.keys == other.keys
        and torch.equal(one.positions, other.positions)
        and torch.equal(one.labels, other.labels)
        and one.views.keys() == other.views.keys()
        and all(torch.equal(one.views[view], other.views[view]) for view in one.views)
    )


def test_a_batch_is_what_its_positions_say(shards: Path, label_of: Callable) -> None:
    samples = make(ShardSource(str(shards)), (CROP, TWIN, WHOLE))
    batch = samples.__getitems__([3, 250, 99])
    ids = samples.order.locate([3, 250, 99]).tolist()
    assert batch.positions.tolist() == [3, 250, 99] and batch.positions.dtype == torch.int64
    assert tuple(key.rpartition("/")[2] for key in batch.keys) == tuple(f"{number:04d}" for number in ids)
    assert batch.labels.tolist() == [label_of(number) for number in ids] and batch.labels.dtype == torch.int64
    for view, images in batch.views.items():
        assert (
            images.shape == (3, 3, *view.size)
            and images.dtype == torch.uint8
            and images.is_contiguous(memory_format=torch.channels_last)
        )
    assert not torch.equal(batch.views[CROP], batch.views[TWIN])
    for row, raw in enumerate(samples.source.read(ids)):
        image = Image.fromarray(decode(raw))
        assert np.array_equal(batch.views[WHOLE][row].permute(1, 2, 0), np.asarray(image))
        numbers = draw_numbers(CROP, seed=5, positions=batch.positions)[row].tolist()
        left, top, width, height = crop_box(*image.size, CROP, numbers)
        crop = image.crop((left, top, left + width, top + height)).resize((6, 8), 3)
        expected = np.asarray(crop)[:, :: -1 if numbers[22] < 0.5 else 1]
        assert np.abs(batch.views[CROP][row].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1  # PIL's last bit
    assert same(samples[250], samples.__getitems__([250]))
    assert len(samples) == 100


def test_one_view_is_the_same_beside_others_and_without_labels(shards: Path) -> None:
    source = ShardSource(str(shards))
    alone = make(source, (CROP,), labels=False).__getitems__(range(9))
    assert alone.labels is None
    assert torch.equal(alone.views[CROP], make(source, (TWIN, CROP)).__getitems__(range(9)).views[CROP])


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(shards: Path, workers: int) -> None:
    samples = make(ShardSource(str(shards)), (CROP, WHOLE))
    options = {"start": 90, "stop": 90 + 5 * 24, "batch_size": 24, "micro_batch": 12}
    expected = list(batches(samples, **options, workers=0))
    found = list(batches(samples, **options, workers=workers))
    assert len(expected) == len(found) == 10
    assert all(map(same, expected, found))
    assert torch.cat([batch.positions for batch in found]).tolist() == list(range(90, 210))  # across the border at 100


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 24), (2, 4), (3, 8), (24, 1)])
def test_processes_take_their_rows_of_each_global_batch(shards: Path, world: int, micro_batch: int) -> None:
    samples = make(ShardSource(str(shards)))
    whole = list(batches(samples, start=7, stop=7 + 72, batch_size=24, micro_batch=24))
    for rank in range(world):
        mine = list(batches(samples, start=7, stop=79, batch_size=24, micro_batch=micro_batch, rank=rank, world=world))
        per_step = 24 // world // micro_batch
        assert len(mine) == 3 * per_step
        for step, batch in enumerate(whole):
            parts = mine[step * per_step : (step + 1) * per_step]
            assert torch.equal(torch.cat([part.positions for part in parts]), batch.positions[rank::world])
            assert torch.equal(torch.cat([part.views[CROP] for part in parts]), batch.views[CROP][rank::world])


def test_going_on_from_a_position_is_going_on(shards: Path) -> None:
    samples = make(ShardSource(str(shards)))
    through = list(batches(samples, start=0, stop=240, batch_size=24, micro_batch=24))
    endless = batches(make(ShardSource(str(shards))), start=5 * 24, stop=None, batch_size=24, micro_batch=24)
    assert all(same(batch, next(endless)) for batch in through[5:])
    endless.close()


def test_indivisible_batch_shows_the_arithmetic(shards: Path) -> None:
    samples = make(ShardSource(str(shards)))
    with pytest.raises(ConfigError, match=r"100 is not a multiple of 3 processes x micro_batch 8 = 24; take 96 or 120"):
        batches(samples, start=0, stop=None, batch_size=100, micro_batch=8, world=3)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 1), (3, 0), (7, 0), (120, 0)])
def test_evaluation_sees_each_sample_once_in_order(shards: Path, world: int, workers: int) -> None:
    samples = make(ShardSource(str(shards)), (WHOLE,), shuffle=False)
    keys = []
    for rank in range(world):
        found = list(evaluation_batches(samples, batch_size=16, rank=rank, world=world, workers=workers))
        mine = [key.rpartition("/")[2] for batch in found for key in batch.keys]
        assert mine == [f"{number:04d}" for number in range(rank, 100, world)]
        assert all(len(batch) == 16 for batch in found[:-1])
        keys += mine
    assert sorted(keys) == [f"{number:04d}" for number in range(100)]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_does_not_decode_arrives_as_one_clean_line(
    tmp_path: Path, write_tar: Callable, encoded: Callable, workers: int
) -> None:
    members = {f"{number:02d}.png": encoded(number) for number in range(16)}
    members["11.png"] = members["11.png"][:60]
    source = ShardSource(write_tar(tmp_path / "s.tar", members))
    samples = make(source, shuffle=False, labels=False)
    found = []
    with pytest.raises(DataError) as error:
        found.extend(batches(samples, start=0, stop=16, batch_size=4, micro_batch=4, workers=workers))
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/s.tar: 11.png (byte ") and message.endswith("replace it or take it out")
    assert "\n" not in message and "Traceback" not in message
    assert [batch.keys[0] for batch in found] == ["s.tar/00", "s.tar/04"]  # what came before the bad one was delivered


def test_labels_are_asked_for_where_there_are_some(shards: Path, write_tar: Callable, encoded: Callable) -> None:
    write_tar(shards / "train-003.tar", {"a.png": encoded(0)})
    source = open_source(shards)
    assert make(source, labels=False).__getitems__([0]).labels is None
    with pytest.raises(DataError, match=r"1 of 101 samples have no label, and labels are needed here; name a labelled set"):
        make(source, labels=True)


def test_augmentation_is_seeded_by_position_and_view(shards: Path) -> None:
    seen: list[int] = []

    def augment(image: object, seed: int) -> object:
        seen.append(seed)
        return image

    samples = make(ShardSource(str(shards)), (CROP, TWIN), augment=augment)
    samples.__getitems__([4, 9])
    first = list(seen)
    assert len(set(first)) == 4 and min(first) >= 0
    seen.clear()
    samples.__getitems__([9])
    assert seen == first[2:]


class Killed:
    """A source whose worker dies as if the kernel had ended it."""

    def __init__(self, source: Source) -> None:
        self.source, self.parent = source, os.getpid()

    def __getattr__(self, name: str) -> object:
        return getattr(self.source, name)

    def read(self, ids: object, ahead: object = None) -> list:
        if os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.source.read(ids)


def test_a_killed_worker_is_named(shards: Path) -> None:
    samples = make(Killed(ShardSource(str(shards))))
    with pytest.raises(DataError, match=r"a data worker was killed, .*; take fewer data\.workers or a smaller micro_batch"):
        list(batches(samples, start=0, stop=24, batch_size=24, micro_batch=24, workers=1))


class Interrupted(Killed):
    """A source whose worker gets Ctrl-C, as every process of the terminal does."""

    def read(self, ids: object, ahead: object = None) -> list:
        if os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGINT)
        return self.source.read(ids)


def test_workers_outlive_an_interrupt(shards: Path) -> None:
    source = ShardSource(str(shards))
    options = {"start": 0, "stop": 48, "batch_size": 24, "micro_batch": 24}
    found = list(batches(make(Interrupted(source)), **options, workers=1))
    assert all(map(same, found, batches(make(source), **options)))


def test_loading_leaves_the_global_generator_alone(shards: Path) -> None:
    samples = make(ShardSource(str(shards)))
    before = torch.get_rng_state()
    list(batches(samples, start=0, stop=24, batch_size=24, micro_batch=12, workers=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("ending", ["closed", "failed"])
def test_workers_end_with_the_iterator(shards: Path, ending: str) -> None:
    samples, others = make(ShardSource(str(shards))), set(multiprocessing.active_children())
    endless = batches(samples, start=0, stop=None, batch_size=24, micro_batch=24, workers=2)
    next(endless)
    assert len(set(multiprocessing.active_children()) - others) == 2
    if ending == "closed":
        endless.close()
    else:
        (shards / "train-000.tar").write_bytes(b"")
        with pytest.raises(DataError, match="the shard ends before this image does") as kept:  # the error keeps its frames
            list(endless)
        assert kept.tb is not None
    assert not set(multiprocessing.active_children()) - others
