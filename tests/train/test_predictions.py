"""Predictions of every test image, by a slow oracle, in their order, through several doors, on processes without a share."""

from types import SimpleNamespace

import pytest
import torch

from vitssl.task import Batch
from vitssl.train.predictions import predict
from vitssl.views import View

VIEW = View(size=(2, 2))


class Told:
    """An engine whose logits are a table's rows at the batch's positions, under each door's own table."""

    def __init__(self, **tables: torch.Tensor) -> None:
        self.device, self.tables, self.asked = torch.device("cpu"), tables, []
        self.wrapped = SimpleNamespace(eval=lambda: self.asked.append("eval"))

    def forward(self, batch, clock, *, features):
        self.asked.append(features)
        return self.tables[features][batch.positions], {}


def batches(labels: torch.Tensor, size: int) -> list[Batch]:
    """Out of order, as the shares of several processes come."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return [Batch({}, rows, labels=labels[rows]) for rows in order.split(size)]


@pytest.mark.parametrize("classes", [2, 4, 9])
def test_by_a_slow_oracle(classes: int):
    generator = torch.Generator().manual_seed(classes)
    logits = 3 * torch.randn(23, classes, generator=generator)
    labels = torch.randint(0, classes, (23,), generator=generator)
    (found,) = predict(Told(logits=logits), batches(labels, 5))
    assert found.positions.tolist() == list(range(23)) and torch.equal(found.labels, labels)
    losses, top1, top5 = [], 0, 0
    for number, (row, label) in enumerate(zip(logits.double(), labels.tolist())):
        p = row.exp() / row.exp().sum()
        ranked = sorted(range(classes), key=lambda each: -float(row[each]))
        losses.append(-float(p[label].log()))
        top1, top5 = top1 + (ranked[0] == label), top5 + (label in ranked[:5])
        assert found.predicted[number] == ranked[0] and found.hits[number] == (ranked[0] == label)
        assert float(found.confidence[number]) == pytest.approx(float(p.max()), rel=1e-6)
    assert found.losses.tolist() == pytest.approx(losses, rel=1e-5, abs=1e-6)
    assert found.means() == pytest.approx({"loss": sum(losses) / 23, "top1": top1 / 23, "top5": top5 / 23}, rel=1e-5)


def test_doors_are_asked_in_one_pass():
    one, two = torch.eye(3), torch.eye(3).flip(0)
    engine = Told(**{"logits": one, "averaged logits": two})
    first, second = predict(engine, batches(torch.arange(3), 2), doors=["averaged logits", "logits"])
    assert first.predicted.tolist() == [2, 1, 0] and second.predicted.tolist() == [0, 1, 2]
    assert engine.asked == ["eval", "averaged logits", "logits", "averaged logits", "logits"]


def test_a_process_without_a_share_has_the_columns_too():
    (found,) = predict(Told(), [])
    assert len(found.labels) == 0 and found.labels.dtype == torch.int64 and found.among_five.dtype == torch.bool
