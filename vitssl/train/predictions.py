"""What a classifier says of every test image: the numbers that accuracy, calibration and the confusion matrix are made of."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitssl import dist
from vitssl.schedule import Clock
from vitssl.task import Batch
from vitssl.train.launch import Engine


@dataclass(frozen=True)
class Predictions:
    """N images in the order of their positions, on the CPU; on every process those of all."""

    positions: Tensor  # [N] int64
    labels: Tensor  # [N] int64
    predicted: Tensor  # [N] int64: the class with the largest logit
    confidence: Tensor  # [N] float64: its probability
    losses: Tensor  # [N] float64: cross entropy in nats, without smoothing
    among_five: Tensor  # [N] bool: whether the label has one of the five largest logits

    @property
    def hits(self) -> Tensor:
        """[N] bool."""
        return self.predicted == self.labels

    def means(self) -> dict[str, float]:
        """``loss``, ``top1`` and ``top5`` over all images."""
        columns = {"loss": self.losses, "top1": self.hits, "top5": self.among_five}
        return {name: float(column.double().mean()) for name, column in columns.items()}


@dataclass(frozen=True)
class SetPredictions:
    """The same of images that may have several labels."""

    positions: Tensor  # [N] int64
    labels: Tensor  # [N, classes] bool
    logits: Tensor  # [N, classes] float32


def predict_sets(engine: Engine, batches: Iterable[Batch], *, doors: Sequence[str] = ("logits",)) -> list[SetPredictions]:
    """As :func:`predict`, of labels [B, classes]; sigmoids are taken class by class, so all logits are kept."""
    engine.wrapped.eval()
    clock = Clock(step=0, total=1, samples=0, seed=0)
    num_classes = engine.task.head.head.out_features
    none = torch.zeros(0, num_classes, device=engine.device)  # a process may have no share of few images
    positions, labels, logits = [none[:, 0].long()], [none.byte()], [[none] for _ in doors]
    with torch.no_grad():
        for batch in batches:
            positions.append(batch.positions.to(engine.device))
            labels.append(batch.labels.to(engine.device).byte())
            for rows, door in zip(logits, doors, strict=True):
                rows.append(engine.forward(batch, clock, features=door)[0].float())
    places, hot = (dist.gather_rows(torch.cat(each)).cpu() for each in (positions, labels))
    order = places.argsort()
    found = (dist.gather_rows(torch.cat(rows)).cpu() for rows in logits)
    return [SetPredictions(places[order], hot[order].bool(), each[order]) for each in found]


def predict(engine: Engine, batches: Iterable[Batch], *, doors: Sequence[str] = ("logits",)) -> list[Predictions]:
    """Predictions through each of the task's ``doors`` (:meth:`Task.forward`'s ``features``), in one pass over the data.

    ``batches`` are this process's share of an evaluation; softmax and loss are computed in float32 at least.
    """
    engine.wrapped.eval()
    clock = Clock(step=0, total=1, samples=0, seed=0)
    found: list[list[Tensor]] = [[] for _ in doors]
    with torch.no_grad():
        for batch in batches:
            for rows, door in zip(found, doors, strict=True):
                logits, _ = engine.forward(batch, clock, features=door)
                rows.append(_row(logits, batch.labels.to(engine.device), batch.positions.to(engine.device)))
    nothing = torch.zeros(0, 6, dtype=torch.float64, device=engine.device)  # a process may have no share of few images
    return [_sorted(dist.gather_rows(torch.cat([nothing, *rows])).cpu()) for rows in found]


def _row(logits: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
    """[B, classes] -> [B, 6] float64, which holds whole numbers exactly up to 2^53: one tensor travels instead of six."""
    log_p = F.log_softmax(logits.float(), dim=-1)
    best, predicted = log_p.max(dim=-1)
    five = log_p.topk(min(5, log_p.shape[-1]), dim=-1).indices
    columns = (positions, labels, predicted, best.exp(), F.nll_loss(log_p, labels, reduction="none"))
    return torch.stack([*(column.double() for column in columns), (five == labels[:, None]).any(dim=-1).double()], dim=1)


def _sorted(rows: Tensor) -> Predictions:
    positions, labels, predicted, confidence, losses, five = rows[rows[:, 0].argsort()].unbind(dim=1)
    return Predictions(positions.long(), labels.long(), predicted.long(), confidence, losses, five.bool())
