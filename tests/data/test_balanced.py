"""Balanced classes: exact counts by class, every image of a class in turn, whoever asks when; and what cannot be balanced."""

import pickle
import time

import numpy as np
import pytest
from labels import Labels

from finetune.labels import balance
from vitssl.data.mixing import BLOCK
from vitssl.data.repeats import RepeatedOrder
from vitssl.data.sources import Balanced, Joined, open_source
from vitssl.errors import ConfigError, DataError


def source(*counts: int, **options) -> Labels:
    """``counts[c]`` images of class c, mixed."""
    return Labels(np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts)), **options)


COUNTS = (5, 20, 175)


@pytest.mark.parametrize(
    "power, shares",
    [(1.0, (1 / 3, 1 / 3, 1 / 3)), (0.5, np.sqrt(COUNTS) / np.sqrt(COUNTS).sum()), (1e-9, np.array(COUNTS) / 200)],
)
def test_every_block_holds_each_class_by_its_share(power: float, shares):
    images = source(*COUNTS)
    found = images.numbers[Balanced(images, power).order(3).locate(np.arange(80 * BLOCK))].reshape(80, BLOCK)
    counts = np.stack([np.bincount(block, minlength=3) for block in found])
    assert (np.abs(counts - BLOCK * np.array(shares)) <= 1).all()
    assert np.abs(counts.sum(axis=0) / (80 * BLOCK) - shares).max() < 3e-3


def test_each_class_has_its_own_epochs():
    """Of a class of 20, any 20 of its samples in a row are all of them, and the next 20 come in another order."""
    images = source(*COUNTS)
    ids = Balanced(images, 1.0).order(3).locate(np.arange(60 * BLOCK))
    for label, count in enumerate(COUNTS):
        own = ids[images.numbers[ids] == label]
        epochs = own[: len(own) // count * count].reshape(-1, count)
        assert len(epochs) > 5 and all(len(set(epoch.tolist())) == count for epoch in epochs)
        assert len({tuple(epoch.tolist()) for epoch in epochs[:6]}) > 1


def test_the_order_is_a_function_of_seed_and_position():
    images = source(*COUNTS)
    order = Balanced(images, 0.5).order(3)
    whole = order.locate(np.arange(1000))
    assert Balanced(images, 0.5).order(3).locate(np.arange(900, 1000)).tolist() == whole[900:].tolist()  # a continued run
    assert pickle.loads(pickle.dumps(order)).locate(np.arange(7, 1000, 11)).tolist() == whole[7::11].tolist()  # and a worker
    assert Balanced(images, 0.5).order(4).locate(np.arange(1000)).tolist() != whole.tolist()
    twice = RepeatedOrder(order, repeats=2, stride=10).locate(np.arange(40))
    assert twice.tolist() == [*whole[:10], *whole[:10], *whole[10:20], *whole[10:20]]


def test_many_classes():
    """2,000 classes of 1 to 40 images: opened and asked in a moment, and a period of the mixture shows each equally often."""
    images = source(*np.random.default_rng(1).integers(1, 41, 2000))
    begun = time.perf_counter()
    order = Balanced(images, 1.0).order(0)
    ids = order.locate(np.arange(500 * BLOCK, 505 * BLOCK))
    assert time.perf_counter() - begun < 5 and len(np.unique(images.numbers[ids])) == 500
    assert set(order._mixed.counts(1024 * BLOCK).tolist()) <= {51, 52}


def test_a_source_keeps_its_ids_and_answers(tmp_path, picture=b"x"):
    for name in ("cat/1", "cat/2", "dog/1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jpg").write_bytes(picture)
    plain = open_source(tmp_path)
    even = balance(plain, 1.0, cached=False)
    assert even.read([2, 0]) == plain.read([2, 0]) and even.label_array().tolist() == [0, 0, 1]
    kept = ("name", "num_samples", "classes", "fingerprint", "labels", "ignored", "by_chunk", "mean_bytes")
    assert all(getattr(even, each) == getattr(plain, each) for each in kept)
    assert balance(plain, 0.0, cached=False) is plain


REFUSED = {
    "an empty class": (
        source(3, 5, classes=("a", "b", "c")),
        DataError,
        r"\(c has 0\): balance=0.5 shows every class; add images",
    ),
    "no labels": (source(3, labels=False), DataError, r"photos: balance needs a label for every image"),
    "a mixture": (Joined.__new__(Joined), ConfigError, r"balance and data\.sources exclude each other"),
    "remote": (source(3, 5, by_chunk=True), ConfigError, r"of photos each costs a whole chunk; name data\.cache"),
}


@pytest.mark.parametrize("images, kind, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_balanced(images, kind: type, message: str):
    with pytest.raises(kind, match=message) as error:
        Balanced(images, 0.5) if "no label" in message or "needs a label" in message else balance(images, 0.5, cached=False)
    assert "\n" not in str(error.value)


def test_a_share_of_next_to_nothing_is_refused():
    with pytest.raises(DataError, match=r"balance=0.01 gives class 0 \(1 images\) less than one in 102,400 samples; raise"):
        Balanced(source(1, 400_000), 0.01)
    assert balance(source(3, 5, by_chunk=True), 0.5, cached=True).by_chunk
