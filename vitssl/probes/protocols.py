"""The published ways to judge frozen features, by name: features of two splits in, rows of numbers out.

Where a protocol has a setting to choose (a learning rate, a penalty), it is chosen on a tenth of the training samples that is
held out for that, and the head is then trained again on all of them; the test split is looked at once. Surprising: the papers
that publish a grid often report the best of it on the test split itself, so theirs may be a little higher.

The published linear protocols take a new random crop and flip of each training image in each epoch, endlessly many. A split
may carry K such views of its images (``crops``): epoch e trains on view e mod K, so as many as epochs are what is published.
Without any they see the centre crop, as everything else always does: neighbours, what is held out, and the test images. Crops
are torchvision's, bicubic; MoCo v3 and DINO resize bilinearly, and MAE tries a crop once where torchvision tries ten times.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from vitssl import draws
from vitssl.probes.attentive import attentive_accuracy, train_attentive
from vitssl.probes.fewshot import fewshot_accuracy
from vitssl.probes.heads import Recipe, best_head, train_heads
from vitssl.probes.knn import knn_accuracy
from vitssl.probes.linear import ridge_accuracy
from vitssl.probes.logistic import GRID, logistic_accuracies
from vitssl.probes.spectrum import alpha_req, rankme
from vitssl.views import purpose

_HELD_OUT = purpose("held out of a probe")
_DINOV2_RATES = (*(digit * 10.0**power for power in range(-5, -1) for digit in (1, 2, 5)), 0.1)  # x batch / 256
_ATTENTIVE_RATES = (1e-4, 3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class Split:
    """Features by kind (``class``, ``mean``, ``class_4``: [N, D]; ``patches``: [N, P, D]) with ``labels`` [N].

    ``crops``: the same of random crops of the same images, which linear heads are trained on; none: on ``features``.
    """

    features: Mapping[str, Tensor]
    labels: Tensor
    crops: tuple[Mapping[str, Tensor], ...] = ()

    def take(self, rows: Tensor) -> "Split":
        """Some of the samples."""
        views = (self.features, *self.crops)  # patch tokens stay on the host, wherever the rest is
        features, *crops = ({kind: values[rows.to(values.device)] for kind, values in view.items()} for view in views)
        return Split(features, self.labels[rows], tuple(crops))


class Judged(NamedTuple):
    """One number: ``value`` is an accuracy in [0, 1], or what ``setting`` says."""

    protocol: str
    setting: str
    value: float
    seed: int = 0


@dataclass(frozen=True)
class Linear:
    """A linear protocol: per-256 learning rates, which features (of a width), and the rest of the recipe."""

    recipe: Recipe
    kinds: Callable[[int], tuple[str, ...]]
    source: str


def _own(width: int) -> tuple[str, ...]:
    return ("pooled",)


LINEAR: dict[str, Linear] = {
    "linear_mae": Linear(
        Recipe(rates=(0.1,), epochs=90, batch_size=16384, warmup=10, lars=0.001, batch_norm=True),
        _own,
        "MAE main_linprobe.py",
    ),
    "linear_moco_v3": Linear(Recipe(rates=(3.0,), epochs=90, batch_size=1024), _own, "MoCo v3 main_lincls.py"),
    "linear_dino": Linear(
        Recipe(rates=(1e-3,), epochs=100, batch_size=1024),
        lambda width: ("class_4",) if width <= 384 else ("class+mean",),
        "DINO eval_linear.py",
    ),
    "linear_dinov2": Linear(
        Recipe(rates=_DINOV2_RATES, epochs=10, batch_size=1024),
        lambda width: ("class", "class+mean", "class_4", "class_4+mean"),
        "DINOv2 eval/linear.py: its grid",
    ),
}


def needed(protocols: Sequence[str]) -> tuple[str, ...]:
    """The kinds of features that these protocols ask for, beside the pooled ones of all."""
    kinds = {
        "linear_dino": ("class", "mean", "class_4"),
        "linear_dinov2": ("class", "mean", "class_4"),
        "attentive": ("patches",),
    }
    return tuple(dict.fromkeys(kind for name in protocols for kind in kinds.get(name, ())))


def judge(protocol: str, train: Split, test: Split, *, seeds: int = 3) -> list[Judged]:
    """The rows of one protocol (a name of :data:`PROTOCOLS`); ``pooled`` is the kind that the encoder's export names."""
    return PROTOCOLS[protocol](protocol, train, test, seeds)


def wilson(accuracy: float, num: int, *, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of an accuracy over ``num`` samples (Wilson 1927)."""
    centre, spread = accuracy + z * z / (2 * num), z * math.sqrt(accuracy * (1 - accuracy) / num + z * z / (4 * num * num))
    return (centre - spread) / (1 + z * z / num), (centre + spread) / (1 + z * z / num)


def _knn(name: str, train: Split, test: Split, seeds: int) -> list[Judged]:
    features = train.features["pooled"], train.labels, test.features["pooled"], test.labels
    neighbours = [k for k in (10, 20, 100, 200) if k <= len(train.labels)] or [len(train.labels)]
    return [Judged(name, f"k={k}", knn_accuracy(*features, k=k)) for k in neighbours]


def _fewshot(name: str, train: Split, test: Split, seeds: int) -> list[Judged]:
    features = train.features["pooled"], train.labels, test.features["pooled"], test.labels
    most = int(torch.bincount(train.labels).max())
    cases = [(shots, seed) for shots in (1, 5, 10, 25) if shots <= most for seed in range(seeds)]
    return [Judged(name, f"{shots} shots", fewshot_accuracy(*features, shots=shots, seed=seed), seed) for shots, seed in cases]


def _ridge(name: str, train: Split, test: Split, seeds: int) -> list[Judged]:
    features = train.features["pooled"], train.labels, test.features["pooled"], test.labels
    return [Judged(name, "penalty 1e-4 N", ridge_accuracy(*features, strength=1e-4))]


def _logistic(name: str, train: Split, test: Split, seeds: int) -> list[Judged]:
    of = "pooled"
    fit, held = _held_out(train, of)
    found = logistic_accuracies(fit.features[of], fit.labels, held.features[of], held.labels, grid=GRID[::4], steps=200)
    best = GRID[::4][max(range(len(found)), key=found.__getitem__)]
    (value,) = logistic_accuracies(train.features[of], train.labels, test.features[of], test.labels, grid=(best,))
    return [Judged(name, f"C={best:.3g}", value)]


def _linear(name: str, train: Split, test: Split, seeds: int) -> list[Judged]:
    protocol, width = LINEAR[name], train.features["pooled"].shape[1]
    batch_size, published = _batch_size(protocol.recipe.batch_size, len(train.labels)), protocol.recipe.batch_size
    scale = (published if protocol.recipe.lars else batch_size) / 256  # LARS moves by shares of the weights, at any batch
    rates = tuple(rate * scale for rate in protocol.recipe.rates)
    recipe = replace(protocol.recipe, rates=rates, batch_size=batch_size)
    kinds = [kind for kind in protocol.kinds(width) if all(part in train.features for part in kind.split("+"))] or ["pooled"]
    chosen = kinds[0], recipe.rates[0]
    if len(kinds) > 1 or len(recipe.rates) > 1:
        fit, held, found = *_held_out(train, *kinds), []
        for kind in kinds:
            heads = train_heads(_shown(fit, kind), fit.labels, recipe, num_classes=_classes(train, test))
            number, accuracy = best_head(heads, _kind(held, kind), held.labels)
            found.append((accuracy, kind, recipe.rates[number]))
        _, *chosen = max(found, key=lambda row: row[0])
    kind, rate = chosen
    rows, alone = [], replace(recipe, rates=(rate,))
    for seed in range(seeds):
        heads = train_heads(_shown(train, kind), train.labels, alone, num_classes=_classes(train, test), seed=seed)
        (value,) = heads.accuracies(_kind(test, kind), test.labels)
        crops = f", {len(train.crops)} crops" if train.crops else ""
        rows.append(Judged(name, f"{kind}, lr {rate:.3g}{crops}", value, seed))
    return rows


def _attentive(name: str, train: Split, test: Split, seeds: int) -> list[Judged]:
    (fit, held), classes = _held_out(train, "patches"), _classes(train, test)

    def accuracy(on: Split, by: Split, rate: float, seed: int) -> float:
        options = {"num_classes": classes, "lr": rate, "seed": seed, "batch_size": _batch_size(256, len(by.labels))}
        head = train_attentive(by.features["patches"], by.labels, **options)
        return attentive_accuracy(head, on.features["patches"], on.labels)

    rate = max(_ATTENTIVE_RATES, key=lambda rate: accuracy(held, fit, rate, 0))
    return [Judged(name, f"lr {rate:.3g}", accuracy(test, train, rate, seed), seed) for seed in range(seeds)]


def _spectrum(name: str, train: Split, test: Split, seeds: int) -> list[Judged]:
    features = test.features["pooled"]
    return [Judged("rankme", f"of {features.shape[1]}", rankme(features)), Judged("alpha_req", "exponent", alpha_req(features))]


PROTOCOLS: dict[str, Callable[[str, Split, Split, int], list[Judged]]] = {
    "knn": _knn,
    "fewshot": _fewshot,
    "ridge": _ridge,
    "logistic": _logistic,
    **dict.fromkeys(LINEAR, _linear),
    "attentive": _attentive,
    "spectrum": _spectrum,
}
"""By name: (name, training split, test split, seeds) -> rows."""
SOURCES: dict[str, str] = {
    "knn": "weighted k-nearest neighbours, temperature 0.07: DINO eval_knn.py",
    "fewshot": "least squares on a few images of each class: big_vision fewshot_lsr.py",
    "ridge": "ridge regression of one-hot labels on standardised features, in closed form",
    "logistic": "logistic regression by L-BFGS over every fourth penalty of DINOv2's grid",
    **{name: f"{linear.source}; random crops as crops= says" for name, linear in LINEAR.items()},
    "attentive": "one learned query over the patch tokens: CAE, I-JEPA",
    "spectrum": "RankMe (Garrido et al. 2023) and the exponent of alpha-ReQ (Agrawal et al. 2022): no labels are looked at",
}
"""What each protocol is and where it was published."""


def _batch_size(published: int, num: int) -> int:
    """The published one, smaller where an epoch would have fewer than twenty batches: so few steps train nothing."""
    return min(published, max(16, num // 20))


def _held_out(train: Split, *kinds: str) -> tuple[Split, Split]:
    """(nine tenths, a tenth) of the training samples, the same every time, with these ``kinds`` of features alone: a copy of
    all patch tokens is for those who look at them."""
    wanted = {part for kind in kinds for part in kind.split("+")}
    views = ({kind: view[kind] for kind in wanted if kind in view} for view in (train.features, *train.crops))
    centre, *crops = views
    train = Split(centre, train.labels, tuple(crops))
    order = draws.permutation(0, _HELD_OUT, len(train.labels)).to(train.labels.device)
    num = max(1, len(order) // 10)
    return train.take(order[num:]), train.take(order[:num])


def _kind(split: Split, kind: str) -> Tensor:
    return _joined(split.features, kind)


def _shown(split: Split, kind: str) -> list[Tensor]:
    """The views that linear heads are trained on."""
    return [_joined(view, kind) for view in split.crops or (split.features,)]


def _joined(features: Mapping[str, Tensor], kind: str) -> Tensor:
    parts = [features[part] for part in kind.split("+")]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)  # one may be a file that is larger than memory


def _classes(train: Split, test: Split) -> int:
    return int(torch.maximum(train.labels.max(), test.labels.max())) + 1
