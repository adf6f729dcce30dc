"""How well several labels an image are told: average precision of each class, and F1 of the answers above a threshold."""

from typing import NamedTuple

import torch
from torch import Tensor


class ClassCounts(NamedTuple):
    """[classes] int64 each: answers that were right, wrong, and missing."""

    right: Tensor
    wrong: Tensor
    missing: Tensor

    @property
    def f1(self) -> Tensor:
        """[classes] float64: 2 right / (2 right + wrong + missing); not a number where a class was neither there nor told."""
        return 2 * self.right.double() / (2 * self.right + self.wrong + self.missing)


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """[classes] float64: the mean of precision over recall's steps, not interpolated; not a number for a class nobody has.

    scores [N, classes], labels [N, classes] bool. Images of equal score are one step, as in scikit-learn's
    ``average_precision_score`` (Everingham et al. 2015 interpolate instead).
    """
    found = []
    for own, hot in zip(scores.double().T, labels.T, strict=True):
        own, order = own.sort(descending=True)
        right = hot[order].cumsum(0).double()
        ends = torch.ones(len(own), dtype=torch.bool)
        ends[:-1] = own[1:] != own[:-1]
        told = torch.arange(1, len(own) + 1, dtype=torch.float64)[ends]
        recall = right[ends] / right[-1]
        steps = torch.diff(recall, prepend=recall.new_zeros(1))
        found.append((steps * right[ends] / told).sum())
    return torch.stack(found)


def count_answers(told: Tensor, labels: Tensor) -> ClassCounts:
    """What was told [N, classes] bool against labels [N, classes] bool."""
    return ClassCounts(*((each).sum(dim=0) for each in (told & labels, told & ~labels, ~told & labels)))


def micro_f1(counts: ClassCounts) -> float:
    """F1 of all answers together; not a number where there is nothing to tell and nothing told."""
    return float(ClassCounts(*(each.sum() for each in counts)).f1)
