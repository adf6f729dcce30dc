"""Which classes there are: labels as the config reads them, one or several an image, renamed, merged and dropped by its map."""

import difflib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from finetune.config import FinetuneConfig
from vitssl.data.feed import open_configured
from vitssl.data.sources import Joined, Renumbered, Several, Source, Subset, label_like, several_labels, several_like
from vitssl.data.sources.base import refuse_stray
from vitssl.data.sources.several import renumbered
from vitssl.errors import ConfigError, DataError, first_of

Progress = Callable[[int, int], None]


def open_classes(config: FinetuneConfig, progress: Progress | None = None) -> Source:
    """All images to train on, with their labels. Raises ConfigError and DataError, each in one line."""
    _refuse_contradictions(config)
    source = open_configured(config.data, key="data", progress=progress)
    if config.labels == "several":
        return _mapped(several_labels(source), config.label_map, others=lambda: _test_names(config))
    labels = source.label_array()
    if labels is None:
        raise DataError(
            f"{source.name}: fine-tuning needs a label for every image (.cls members, or class folders); of"
            " several, take labels=several"
        )
    if source.classes is None:
        refuse_stray(source.name, labels)
    source = _mapped(source, config.label_map, others=lambda: _test_names(config))
    _refuse_empty(source)
    return source


def open_test(config: FinetuneConfig, source: Source, tell: Callable[..., None] = lambda text, style: None) -> Source:
    """The test images, their labels under the numbers that the training images have for the same names.

    ``tell`` is warned where only one of the two sets has names, so that numbers are all there is to join them by.
    """
    images = open_configured(config.test, key="test")
    if isinstance(source, Several):
        found = several_like(_mapped(several_labels(images), config.label_map), source)
        if not found.counts().any():
            raise DataError(f"{images.name}: label_map leaves no test image a label; correct the map, or the test images")
        return found
    images = _mapped(images, config.label_map)
    found = label_like(images, source)
    if bool(images.classes) != bool(source.classes):
        named, other = (images, source) if images.classes else (source, images)
        tell(
            f"warning: {named.name} names its classes and {other.name} only numbers them, so they are joined by number:"
            f" {named.classes[0]} is 0; give both names if that is not so",
            style="yellow",
        )
    return found


def names_of(source: Source) -> tuple[str, ...]:
    """The names of the classes; their numbers where they have none."""
    return source.classes or tuple(map(str, range(int(source.label_array().max()) + 1)))


def _mapped(source: Source, names: Mapping[str, str | None], *, others: Callable[[], Sequence[str]] | None = None) -> Source:
    """``source`` with classes called and joined as ``names`` says, those without a new name dropped with their images.

    ``others`` tells the names that may be given though ``source`` lacks them; None: any may. Raises ConfigError for one that is
    nowhere, and for a mixture.
    """
    if not names or (not isinstance(source, Several) and source.label_array() is None):
        return source
    if isinstance(source, Joined):
        raise ConfigError("label_map and data.sources exclude each other; mix sources whose classes have the same names")
    old = names_of(source)
    missing = [name for name in names if name not in old] if others else []
    elsewhere = others() if missing else ()
    for name in missing:
        if name not in elsewhere:
            near = difflib.get_close_matches(name, old, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"there are {first_of(old)}"
            raise ConfigError(f"label_map.{name}: {source.name} has no such class; {hint}")
    new = [names.get(name, name) for name in old]
    classes = tuple(dict.fromkeys(name for name in new if name is not None))
    numbers = np.array([-1 if name is None else classes.index(name) for name in new])
    if isinstance(source, Several):
        return renumbered(source, numbers, classes)
    kept = np.flatnonzero(numbers[source.label_array()] >= 0)
    return Renumbered(source if len(kept) == source.num_samples else Subset(source, kept), numbers, classes)


def _test_names(config: FinetuneConfig) -> Sequence[str]:
    """The names of the test images' classes: some may be there alone, and the map may rename or drop them."""
    images = open_configured(config.test, key="test")
    if config.labels == "several":
        return several_labels(images).classes
    return () if images.label_array() is None else names_of(images)


def _refuse_empty(source: Source) -> None:
    """Raise DataError for classes that are named and have no image, and where all images are of one class."""
    there = np.unique(source.label_array()).tolist()
    if source.classes and len(there) < len(source.classes):
        missing = [name for number, name in enumerate(source.classes) if number not in there]
        raise DataError(
            f"{source.name}: {len(missing):,} of {len(source.classes):,} classes have no image ({first_of(missing)}), so"
            f" nothing could learn them; add images, or take them out: the folder, or label_map={{{missing[0]}: null}}"
        )
    if len(there) == 1:
        raise DataError(
            f"{source.name}: all images are of one class, {names_of(source)[there[0]]}, so there is nothing to tell apart; add"
            " another"
        )


def _refuse_contradictions(config: FinetuneConfig) -> None:
    if config.labels == "one":
        return
    if config.loss != "bce":
        raise ConfigError(f"labels=several needs loss=bce: loss={config.loss} takes one class of an image")
    if config.teacher is not None:
        raise ConfigError("labels=several and teacher exclude each other: distillation is of one class an image")
    given = {"labelled": config.labelled, "shots": config.shots, "balance": config.balance or None}
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"labels=several and {name}={value} exclude each other: an image is of no one class to count")
