"""What a classifier's predictions come to: calibration, the confusion matrix and a table of the classes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vitssl.probes.protocols import wilson


def calibration_error(confidence: Tensor, hits: Tensor, *, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, equation 3): |accuracy - confidence|, weighted, over equal bins (a, b].

    confidence [N] in [0, 1], hits [N] bool. Not a number for no images.
    """
    confidence, hits = confidence.double(), hits.double()
    number = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, number, hits - confidence)
    return float(gaps.abs().sum() / len(hits)) if len(hits) else float("nan")


def confusion(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """[N], [N] -> [classes, classes] int64: how many images of a row's class were taken for a column's."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_table(counts: Tensor, classes: Sequence[str]) -> list[dict[str, object]]:
    """A row a class that has images or was predicted, in the order of the classes.

    ``counts`` [classes, classes] as from :func:`confusion`. ``recall`` is the class's accuracy, ``low`` and ``high`` its 95 %
    interval, ``precision`` None where the class was never predicted; ``taken_for`` is the commonest mistake.
    """
    rows = []
    for number, name in enumerate(classes):
        images, right, predicted = int(counts[number].sum()), int(counts[number, number]), int(counts[:, number].sum())
        if not (images or predicted):
            continue
        wrong = counts[number].clone()
        wrong[number] = 0
        low, high = wilson(right / images, images) if images else (None, None)
        rows.append({
            "class": name,
            "images": images,
            "recall": right / images if images else None,
            "low": low,
            "high": high,
            "precision": right / predicted if predicted else None,
            "taken_for": classes[int(wrong.argmax())] if wrong.any() else None,
            "times": int(wrong.max()),
        })  # fmt: skip
    return rows


def weakest(rows: Sequence[dict[str, object]], num: int) -> str:
    """The ``num`` classes of the lowest recall in words."""
    found = sorted((row for row in rows if row["images"]), key=lambda row: row["recall"])[:num]
    return ", ".join(
        f"{row['class']} {row['recall']:.1%}" + (f" (taken for {row['taken_for']})" if row["taken_for"] else "")
        for row in found
    )
