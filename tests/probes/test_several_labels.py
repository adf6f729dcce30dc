"""Average precision and F1 of several labels, against scikit-learn and by hand."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score

from vitssl.probes.several import average_precision, count_answers, micro_f1


@pytest.mark.parametrize("seed, ties", [(0, False), (1, True), (2, True)])
def test_both_equal_scikit_learn(seed: int, ties: bool):
    rng = np.random.default_rng(seed)
    labels, scores = rng.random((50, 7)) < 0.3, rng.normal(size=(50, 7))
    labels[0] = True
    scores = scores.round(0) if ties else scores
    found = average_precision(torch.from_numpy(scores), torch.from_numpy(labels))
    np.testing.assert_allclose(found, average_precision_score(labels, scores, average=None), rtol=1e-12)
    counts = count_answers(torch.from_numpy(scores) > 0.5, torch.from_numpy(labels))
    np.testing.assert_allclose(counts.f1, f1_score(labels, scores > 0.5, average=None), rtol=1e-12)
    assert micro_f1(counts) == pytest.approx(f1_score(labels, scores > 0.5, average="micro"), rel=1e-12)


def test_by_hand():
    scores = torch.tensor([[0.9], [0.8], [0.7], [0.6]])
    labels = torch.tensor([[True], [False], [True], [False]])
    assert float(average_precision(scores, labels)) == pytest.approx((1 + 2 / 3) / 2)
    assert float(average_precision(torch.zeros(4, 1), labels)) == pytest.approx(0.5)  # all equal: one step
    counts = count_answers(scores > 0.65, labels)
    assert tuple(map(int, counts)) == (2, 1, 0) and float(counts.f1) == pytest.approx(4 / 5)


def test_of_a_class_nobody_has_nothing_is_said():
    nobody = torch.zeros(3, 1, dtype=torch.bool)
    assert math.isnan(average_precision(torch.randn(3, 1), nobody)) and math.isnan(count_answers(nobody, nobody).f1)
