"""Few labels: counts, shares and shots are seeded, stratified and nested, by a slow oracle; classes too small are named."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from labels import Labels

from finetune.labels import choose_labelled, take_share
from vitssl.data.sources import Joined
from vitssl.errors import ConfigError, DataError


def source(*counts: int, **options) -> Labels:
    """``counts[c]`` images of class c, mixed."""
    numbers = np.repeat(np.arange(len(counts)), counts)
    return Labels(np.random.default_rng(0).permutation(numbers).tolist(), **options)


def chosen(images: Labels, seed: int = 0, **options) -> set[int]:
    found = choose_labelled(images, **{"labelled": None, "shots": None} | options, seed=seed)
    return set(found.ids.tolist())


def by_class(images: Labels, ids: set[int]) -> list[int]:
    return np.bincount(images.label_array()[sorted(ids)], minlength=max(images.numbers) + 1).tolist()


COUNTS = (10, 20, 30, 40)
WANTED = [
    ({"shots": 1}, [1, 1, 1, 1]),
    ({"shots": 10}, [10, 10, 10, 10]),
    ({"labelled": 8}, [2, 2, 2, 2]),
    ({"labelled": "100%"}, [10, 20, 30, 40]),
    ({"labelled": "10%"}, [1, 2, 3, 4]),
    ({"labelled": "25%"}, [3, 5, 8, 10]),  # halves are rounded up
    ({"labelled": "0.1%"}, [1, 1, 1, 1]),  # at least one
]


@pytest.mark.parametrize("asked, expected", WANTED, ids=[str(asked) for asked, _ in WANTED])
def test_how_many_of_each_class(asked: dict, expected: list[int]):
    assert by_class(source(*COUNTS), chosen(source(*COUNTS), **asked)) == expected


def test_all_where_nothing_is_asked():
    images = source(3, 3)
    assert choose_labelled(images, labelled=None, shots=None, seed=0) is images


def test_choices_are_seeded_and_nested():
    images = source(*COUNTS)
    assert chosen(images, shots=5) == chosen(images, shots=5) != chosen(images, shots=5, seed=1)
    assert chosen(images, shots=3) < chosen(images, shots=5) == chosen(images, labelled=20)
    assert chosen(images, labelled="10%") < chosen(images, labelled="25%")
    assert chosen(images, shots=1) < chosen(images, labelled="10%") < chosen(images, shots=4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.floats(0.001, 1), st.integers(0, 2**40))
def test_a_share_by_a_slow_oracle(counts: list[int], share: float, seed: int):
    images = source(*counts)
    found = by_class(images, set(take_share(images, share=share, seed=seed).ids.tolist()))
    for count, taken in zip(counts, found, strict=True):
        assert taken == max(1, int(np.floor(share * count + 0.5)))


def test_every_image_of_a_class_can_be_drawn():
    images = source(4, 4)
    drawn = [chosen(images, seed=seed, shots=1) for seed in range(200)]
    assert set().union(*drawn) == set(range(8))


REFUSED = {
    "too small": (
        (3, 5, 2),
        {"shots": 4},
        None,
        r"photos: too few labelled images of 2 of 3 classes \(0 has 3, 2 has 2\)",
    ),
    "an empty class": (
        (3, 5),
        {"shots": 1},
        "abc",
        r"1 of 3 classes \(c has 0\): shots=1 needs 1 of each; lower shots",
    ),
    "a share of nothing": ((3, 5), {"labelled": "50%"}, "abc", r"1 of 3 classes \(c has 0\): labelled=50% is a share of each"),
    "many": ((1,) * 9, {"shots": 2}, None, r"9 of 9 classes \(0 has 1, 1 has 1, 2 has 1, and 6 more\)"),
}


@pytest.mark.parametrize("counts, asked, classes, message", REFUSED.values(), ids=REFUSED)
def test_classes_too_small_are_named(counts: tuple, asked: dict, classes: str | None, message: str):
    images = source(*counts, classes=classes and tuple(classes))
    with pytest.raises(DataError, match=message) as error:
        chosen(images, **asked)
    assert "\n" not in str(error.value)


def test_contradictions_are_refused():
    with pytest.raises(ConfigError, match=r"labelled=5% and shots=2 are both given; keep one of them"):
        chosen(source(3, 3), labelled="5%", shots=2)
    mixture = Joined.__new__(Joined)
    with pytest.raises(ConfigError, match=r"shots and data\.sources exclude each other"):
        choose_labelled(mixture, labelled=None, shots=2, seed=0)
