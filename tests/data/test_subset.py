"""Sources made of others: few labels, balanced, seeded and nested; labels that meet by their names."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vitssl.data.sources import ShardSource, Subset, label_like, open_source, take_labelled
from vitssl.errors import DataError


def test_labels_meet_by_their_names(classes: Callable, shards: Path, photos: Path) -> None:
    training, few = classes("a", "b", "c", "d"), classes("b", "d")
    assert few.label_array().tolist() == [0, 0, 1, 1]
    source = label_like(few, training)
    assert source.label_array().tolist() == [1, 1, 3, 3] and [raw.label for raw in source.read([2, 0])] == [3, 1]
    assert source.classes == training.classes and [raw.key for raw in source.read([2])] == ["d/0.png"]
    assert label_like(training, training) is training
    with pytest.raises(DataError, match=r"a-b-c-d: 2 classes are not among those of .*b-d: a, c; correct one"):
        label_like(training, few)
    unnamed = open_source(shards)  # has numbers only, 0 to 3
    assert label_like(few, unnamed) is few
    with pytest.raises(DataError, match=r"has label 3, .*b-d has 0 to 1; correct one"):
        label_like(unnamed, few)
    (photos / "top.png").write_bytes(b"x")
    for pair in ((open_source(photos), few), (few, open_source(photos))):
        with pytest.raises(DataError, match="photos: needs a label for every image here"):
            label_like(*pair)


def test_few_labels_are_balanced_seeded_and_nested(shards: Path) -> None:
    source = ShardSource(str(shards))
    counts = np.bincount(source.label_array())
    assert counts.tolist() == [10, 20, 30, 40]
    chosen = take_labelled(source, num=20, seed=0)
    assert np.bincount(chosen.label_array()).tolist() == [5, 5, 5, 5]
    assert (np.diff(chosen.ids) > 0).all()
    assert np.array_equal(chosen.ids, take_labelled(source, num=20, seed=0).ids)
    assert not np.array_equal(chosen.ids, take_labelled(source, num=20, seed=1).ids)
    assert set(chosen.ids) < set(take_labelled(source, num=23, seed=0).ids)
    assert sorted(np.bincount(take_labelled(source, num=23, seed=0).label_array()).tolist()) == [5, 6, 6, 6]
    sixty = np.bincount(take_labelled(source, num=60, seed=0).label_array()).tolist()  # the first class has only ten
    assert sixty[0] == 10 and sorted(sixty) == [10, 16, 17, 17]
    assert np.bincount(take_labelled(source, num=100, seed=0).label_array()).tolist() == [10, 20, 30, 40]


def test_few_labels_need_labels_and_samples(shards: Path, write_tar: Callable, encoded: Callable) -> None:
    source = ShardSource(str(shards))
    for num in (0, 101):
        with pytest.raises(DataError, match=r"cannot choose [\d,]+ of 100 labelled samples; ask for 1 to 100"):
            take_labelled(source, num=num, seed=0)
    write_tar(shards / "train-003.tar", {"a.png": encoded(0), "b.png": encoded(1)})
    partly = ShardSource(str(shards))
    assert not partly.labels and partly.label_array() is None and partly.read([100])[0].label is None
    with pytest.raises(DataError, match=r"2 of 102 samples have no label; name a labelled set"):
        take_labelled(partly, num=10, seed=0)
    with pytest.raises(DataError, match=r"no sample was chosen of 100"):
        Subset(source, [])
