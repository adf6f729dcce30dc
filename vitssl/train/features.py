"""Frozen features: what every probe is given, extracted through the wrapper on any number of processes."""

from collections.abc import Iterable

import torch
from torch import Tensor

from vitssl import dist
from vitssl.schedule import Clock
from vitssl.task import Batch
from vitssl.train.launch import Engine


def extract(engine: Engine, batches: Iterable[Batch], *, pooling: str) -> tuple[Tensor, Tensor]:
    """(features [N, D] float32, labels [N] int64) on the device, in the order of the positions, on every process.

    Images without labels have -1.
    """
    engine.wrapped.eval()
    features, labels, positions = [], [], []
    with torch.no_grad():
        for batch in batches:
            rows, _ = engine.forward(batch, Clock(step=0, total=1, samples=0, seed=0), features=pooling)
            features.append(rows.float())
            unlabelled = torch.full_like(batch.positions, -1)
            labels.append((unlabelled if batch.labels is None else batch.labels).to(engine.device))
            positions.append(batch.positions.to(engine.device))
    nothing = torch.zeros(0, engine.task.encoder.spec.dim, device=engine.device)  # a process may have no share of few images
    none = torch.zeros(0, dtype=torch.int64, device=engine.device)
    parts = [nothing, *features], [none, *labels], [none, *positions]
    rows, labels, positions = (dist.gather_rows(torch.cat(part)) for part in parts)
    order = torch.argsort(positions)
    return rows[order], labels[order]
