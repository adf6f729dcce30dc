"""The gradient of one optimiser step from its micro-batches: as the mean of their losses, or as the loss of all at once.

A contrastive loss of 64 samples is not the mean of four losses of 16. So where samples are compared, the micro-batches are
embedded first, without gradient; the whole batch is compared once; then each micro-batch is embedded again under the same
random numbers, and the gradients of its embeddings are carried back through it (Gao et al. 2021, GradCache). It costs one
encoder forward more and gives the gradient of one large batch, up to the order of its sums.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from vitssl.schedule import Clock
from vitssl.task import Batch
from vitssl.train.launch import Engine


def mean_step(engine: Engine, clock: Clock, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Gradients of the mean of the micro-batches' losses. Returns the means of loss and metrics, on the device."""
    sums: dict[str, Tensor] = {}
    engine.seed_step(clock)
    for number, batch in enumerate(batches):
        with engine.micro_step(last=number == engine.accumulation - 1):
            loss, metrics = engine.forward(batch, clock)
            engine.backward(loss)
        _add(sums, {"loss": loss.detach(), **metrics}, engine.accumulation)
    return sums


def exact_step(engine: Engine, clock: Clock, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Gradients of the loss of all micro-batches together. Returns its loss and metrics, on the device."""
    num, kept, embedded = engine.accumulation, [], []
    for number, batch in enumerate(batches):
        engine.seed_step(clock, number)
        kept.append(batch)
        with torch.no_grad():
            embedded.append(engine.forward(batch, clock, phase="embed"))
    embeddings = {key: _leaf([part[key] for part, _ in embedded]) for key in embedded[0][0]}
    targets = {key: torch.cat([part[key] for _, part in embedded]) for key in embedded[0][1]}
    lengths = {key: [len(part[key]) for part, _ in embedded] for key in embeddings}
    engine.seed_step(clock, num)
    with engine.micro_step(last=False):
        loss, metrics = engine.forward(None, clock, phase="compare", given=embeddings | targets)
        engine.backward(loss * num)  # which divides by it
    each = num / engine.loss_scale  # a carried gradient is divided by the one and multiplied by the other again
    gradients = {key: (_gradient(rows) * each).split(lengths[key]) for key, rows in embeddings.items()}
    sums = {"loss": loss.detach().float(), **{name: value.float() for name, value in metrics.items()}}
    for number, batch in enumerate(kept):
        engine.seed_step(clock, number)
        with engine.micro_step(last=number == num - 1):
            given = {key: parts[number] for key, parts in gradients.items()}
            loss, metrics = engine.forward(batch, clock, phase="carry", given=given)
            engine.backward(loss)
        _add(sums, metrics, num)
    return sums


def _leaf(parts: list[Tensor]) -> Tensor:
    """The rows of all micro-batches, in fp32 at least, to have a gradient of their own."""
    rows = torch.cat(parts)
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).requires_grad_()


def _gradient(rows: Tensor) -> Tensor:
    """That of an embedding; 0 where the loss did not look."""
    return torch.zeros_like(rows) if rows.grad is None else rows.grad


def _add(sums: dict[str, Tensor], values: dict[str, Tensor], num: int) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0) + value.float() / num
