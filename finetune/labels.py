"""Which images a run trains on, and how often: few labels are seeded, stratified and nested, classes balanced by a power."""

import numpy as np
import torch

from vitssl import draws
from vitssl.data.sources import Balanced, Joined, Source, Subset, take_labelled
from vitssl.errors import ConfigError, DataError, first_of
from vitssl.views import purpose


def choose_labelled(source: Source, *, labelled: int | str | None, shots: int | None, seed: int) -> Source:
    """``source``, or the part of it that the config asks for.

    ``labelled``: a number of images, as many of each class as there are to be had; or a share of each class, ``1%``, rounded
    and at least one image of it. ``shots``: so many images of every class. Raises ConfigError for two of these at once and for
    a mixture, DataError for a class that is empty or has fewer images than ``shots``.
    """
    if labelled is None and shots is None:
        return source
    if labelled is not None and shots is not None:
        raise ConfigError(f"labelled={labelled} and shots={shots} are both given; keep one of them")
    if isinstance(source, Joined):
        given = "labelled" if labelled is not None else "shots"
        raise ConfigError(f"{given} and data.sources exclude each other: few labels are balanced by class, not by weight")
    if isinstance(labelled, int):
        return take_labelled(source, num=labelled, seed=seed)
    counts = _class_counts(source)
    if shots is not None:
        _refuse_small(source, counts, shots, f"shots={shots} needs {shots} of each; lower shots, or add images")
        return take_labelled(source, num=shots * len(counts), seed=seed)
    _refuse_small(source, counts, 1, f"labelled={labelled} is a share of each; add images, or take the class out")
    return take_share(source, share=float(labelled.rstrip("%")) / 100, seed=seed)


def balance(source: Source, power: float, *, cached: bool) -> Source:
    """``source``, or where ``power`` is not 0, the same with its classes drawn by it (:class:`Balanced`).

    Raises ConfigError for a mixture, and for remote shards without a cache, DataError for a class without an image.
    """
    if not power:
        return source
    if isinstance(source, Joined):
        raise ConfigError("balance and data.sources exclude each other: a mixture is drawn by the weights of its sources")
    if source.by_chunk and not cached:
        raise ConfigError(
            f"balance={power:g}: images are drawn one by one, and of {source.name} each costs a whole chunk; name data.cache, a"
            " folder on a local disk that keeps them"
        )
    _refuse_small(source, _class_counts(source), 1, f"balance={power:g} shows every class; add images, or take the class out")
    return Balanced(source, power)


def take_share(source: Source, *, share: float, seed: int) -> Subset:
    """The same ``share`` (0, 1] of every class, rounded to the nearest and at least one image; a function of (seed, source).

    The images are drawn as by ``take_labelled``, so of one seed a smaller choice of either kind is part of a larger one
    wherever it has no more of any class.
    """
    labels = source.label_array()
    key = draws.hashed(seed, purpose("few labels"), torch.arange(len(labels)), 1)[:, 0].numpy()
    order = np.lexsort((key, labels))  # class by class, at random inside each
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    rank = np.arange(len(labels)) - np.repeat(starts, counts)  # the how-manieth of its class
    quota = np.maximum(1, np.floor(share * counts + 0.5))
    return Subset(source, np.sort(order[rank < np.repeat(quota, counts)]))


def _class_counts(source: Source) -> dict[str, int]:
    """Images of each class by its name; classes that are named and have none count 0."""
    found = np.bincount(source.label_array(), minlength=len(source.classes or ()))
    names = source.classes or [str(number) for number in range(len(found))]
    return {name: int(count) for name, count in zip(names, found, strict=True) if count or source.classes}


def _refuse_small(source: Source, counts: dict[str, int], fewest: int, why: str) -> None:
    if small := [f"{name} has {count}" for name, count in counts.items() if count < fewest]:
        raise DataError(
            f"{source.name}: too few labelled images of {len(small)} of {len(counts)} classes ({first_of(small)}): {why}"
        )
