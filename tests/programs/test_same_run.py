"""One run, whatever carries it: one process or two, whole batches or accumulated ones, and its own config fed back."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vitssl import draws
from vitssl.data.feed import training_samples
from vitssl.data.loader import batches
from vitssl.data.order import Layout
from vitssl.data.sources import open_source
from vitssl.masks.random import random_keep
from vitssl.sections import DataConfig
from vitssl.views import View, purpose

VIEW = View(size=(16, 16), scale=(0.2, 1.0), flip=0.5)


@pytest.fixture(scope="module")
def whole(exported) -> list[float]:
    """The losses of the run in one process: 20 steps, fp32, batches of 8."""
    return exported.losses()


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [(2, []), (2, ["micro_batch=2"]), (1, ["micro_batch=2"]), (1, ["data.workers=2"]), (1, ["launch.checkpointing=true"])],
    ids=["two processes", "two processes, accumulated", "accumulated", "workers", "checkpointing"],
)
def test_however_it_is_carried_the_losses_are_the_same(
    pretrain: Callable, tmp_path: Path, whole: list[float], processes: int, overrides: list[str]
) -> None:
    run = pretrain(tmp_path / "run", *overrides, processes=processes).ok()
    assert len(whole) == 20 and len(set(whole)) == 20
    np.testing.assert_allclose(run.losses(), whole, rtol=1e-5)
    factors = (processes, 2 if "micro_batch=2" in overrides else 8 // processes)
    assert f"8 = {factors[0]} x {factors[1]} x {8 // factors[0] // factors[1]} (" in run.out
    assert run.out.count("plan of") == 1 and run.files[-1][0].read_text().count("plan of") == (processes == 1)


def test_a_different_seed_is_a_different_run(pretrain: Callable, tmp_path: Path, whole: list[float]) -> None:
    run = pretrain(tmp_path / "run", "seed=1", "length=3").ok()
    assert all(abs(one - other) > 1e-4 for one, other in zip(run.losses(), whole, strict=False))


def test_the_config_it_wrote_makes_the_same_run(start: Callable, tmp_path: Path, exported, whole: list[float]) -> None:
    run = start("pretrain", tmp_path / "again", str(exported.folder / "config.yaml")).ok()
    assert run.losses() == whole
    ours, theirs = ((each.folder / "config.yaml").read_text() for each in (run, exported))
    assert re.sub("name: again|dir: .*", "", ours) == re.sub("name: run|dir: .*", "", theirs)


@pytest.mark.parametrize(("world", "micro_batch", "workers"), [(2, 4, 0), (2, 2, 1), (4, 1, 0)])
def test_processes_share_the_samples_crops_and_masks_of_one(data: Path, world: int, micro_batch: int, workers: int) -> None:
    """At the loader's level: what two or four processes are given is row by row what one is given, across an epoch's border."""
    source = open_source(data, split="train")
    samples = training_samples(source, DataConfig(), [VIEW], seed=3, layouts=[Layout(1, 1024)], channels=3, labels=True)

    def rows(rank: int, world: int, micro_batch: int, workers: int) -> dict[int, tuple]:
        found = {}
        shape = {"start": 48, "stop": 80, "batch_size": 8, "micro_batch": micro_batch}
        for batch in batches(samples, **shape, rank=rank, world=world, workers=workers):
            keep, mask = random_keep(draws.uniform(3, purpose("mae.mask"), batch.positions, 16), 4)
            columns = (batch.keys, batch.labels.tolist(), batch.views[VIEW], keep, mask)
            found |= dict(zip(batch.positions.tolist(), zip(*columns, strict=True), strict=True))
        return found

    one = rows(0, 1, 8, 0)
    shares = [rows(rank, world, micro_batch, workers) for rank in range(world)]
    assert list(one) == list(range(48, 80)) and len({row[0] for row in list(one.values())[:12]}) == 12
    assert sorted(position for share in shares for position in share) == sorted(one)
    for share in shares:
        for position, (key, label, image, keep, mask) in share.items():
            assert (key, label) == one[position][:2]
            assert all(torch.equal(a, b) for a, b in zip((image, keep, mask), one[position][2:], strict=True))
