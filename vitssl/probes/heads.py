"""Linear classifiers on frozen features, many at once: each has its own learning rate, all see the same batches.

The gradient of a linear layer under cross entropy has a closed form, so nothing is recorded for a backward pass and a grid of
fifty learning rates costs little more than one. SGD with momentum (DINO, DINOv2, MoCo v3), or LARS behind a BatchNorm without
parameters (MAE's ``main_linprobe.py``). Surprising in LARS: its momentum holds steps that the learning rate has not scaled, and
biases are neither scaled nor decayed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitssl.lars import trust_ratios
from vitssl.probes.batches import Shuffled
from vitssl.schedule import Schedule

_EPS, _BATCH_MOMENTUM = 1e-6, 0.1  # of MAE's BatchNorm1d


@dataclass(frozen=True)
class Recipe:
    """How heads are trained: ``rates`` are absolute learning rates, one a head; ``epochs`` and ``warmup`` in epochs.

    ``std`` is that of the weights' normal initialisation (0: zeros); ``batch_norm`` standardises features by their batch.
    """

    rates: tuple[float, ...]
    epochs: float
    batch_size: int
    warmup: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    std: float = 0.01
    lars: float | None = None  # the trust coefficient; None: SGD
    batch_norm: bool = False


class LinearHeads:
    """G heads ``weights`` [G, C, D] and ``biases`` [G, C] for features of width D, trained by :meth:`step`."""

    def __init__(self, recipe: Recipe, *, width: int, num_classes: int, seed: int, device: torch.device | str = "cpu") -> None:
        self.recipe, heads = recipe, len(recipe.rates)
        drawn = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(seed))
        self.weights = (recipe.std * drawn).expand(heads, -1, -1).clone().to(device)
        self.biases = torch.zeros(heads, num_classes, device=device)
        self.momenta = torch.zeros_like(self.weights), torch.zeros_like(self.biases)
        self.mean, self.variance = torch.zeros(width, device=device), torch.ones(width, device=device)

    def to(self, dtype: torch.dtype) -> "LinearHeads":
        """The same in another precision."""
        for name in ("weights", "biases", "mean", "variance"):
            setattr(self, name, getattr(self, name).to(dtype))
        self.momenta = tuple(each.to(dtype) for each in self.momenta)
        return self

    def step(self, features: Tensor, labels: Tensor, rates: Tensor) -> Tensor:
        """Update every head on a batch [B, D] with ``labels`` [B] at ``rates`` [G]; returns their losses [G] before that."""
        x = self._standardised(features) if self.recipe.batch_norm else features
        logits = x @ self.weights.transpose(1, 2) + self.biases[:, None]  # [G, B, C]
        log_shares = logits.log_softmax(dim=2)
        rows = torch.arange(len(labels), device=labels.device)
        losses = -log_shares[:, rows, labels].mean(dim=1)
        errors = log_shares.exp_()
        errors[:, rows, labels] -= 1
        errors /= len(labels)
        gradients = errors.transpose(1, 2) @ x, errors.sum(dim=1)
        for number, (values, gradient) in enumerate(zip((self.weights, self.biases), gradients, strict=True)):
            momentum, matrix = self.momenta[number], number == 0
            if matrix or self.recipe.lars is None:
                gradient = gradient + self.recipe.weight_decay * values
            if matrix and self.recipe.lars is not None:
                gradient = gradient * trust_ratios(values, gradient, self.recipe.lars)[:, None, None]
            momentum.mul_(self.recipe.momentum).add_(gradient)
            values -= rates.to(values).view(-1, *[1] * (values.ndim - 1)) * momentum
        return losses

    def logits(self, features: Tensor) -> Tensor:
        """[G, N, C] of features [N, D], standardised by the running statistics."""
        x = (features - self.mean) / (self.variance + _EPS).sqrt() if self.recipe.batch_norm else features
        return x @ self.weights.transpose(1, 2) + self.biases[:, None]

    def accuracies(self, features: Tensor, labels: Tensor, *, chunk: int = 4096) -> list[float]:
        """Top-1 accuracy in [0, 1] of each head; features are taken ``chunk`` rows at a time."""
        right = torch.zeros(len(self.weights), dtype=torch.int64, device=features.device)
        for rows, answers in zip(features.split(chunk), labels.split(chunk), strict=True):
            right += (self.logits(rows.to(self.weights.dtype)).argmax(dim=2) == answers).sum(dim=1)
        return (right.double() / max(1, len(labels))).tolist()

    def _standardised(self, features: Tensor) -> Tensor:
        mean, variance = features.mean(dim=0), features.var(dim=0, unbiased=False)
        unbiased = variance * len(features) / max(1, len(features) - 1)
        self.mean.lerp_(mean, _BATCH_MOMENTUM)
        self.variance.lerp_(unbiased, _BATCH_MOMENTUM)
        return (features - mean) / (variance + _EPS).sqrt()


def train_heads(
    features: Tensor | Sequence[Tensor], labels: Tensor, recipe: Recipe, *, num_classes: int, seed: int = 0
) -> LinearHeads:
    """Heads trained on features [N, D] with ``labels`` [N], a cosine from each rate to 0 after a linear warm-up.

    Of several views of the same samples, each [N, D], epoch e is shown view e mod their number. Batches are those of
    :class:`Shuffled`.
    """
    views = [features] if isinstance(features, Tensor) else list(features)
    num, device = len(labels), views[0].device
    batches = Shuffled(num, epochs=recipe.epochs, batch_size=recipe.batch_size, seed=seed, device=device)
    total = len(batches)
    heads = LinearHeads(recipe, width=views[0].shape[1], num_classes=num_classes, seed=seed, device=device)
    schedule = Schedule(peak=1.0, final=0.0, warmup=min(total, round(recipe.warmup * batches.per_epoch)), total=total)
    rates = torch.tensor(recipe.rates, device=device)
    for step, rows in enumerate(batches):
        view = views[step // batches.per_epoch % len(views)]
        losses = heads.step(view[rows].float(), labels[rows], rates * schedule.at(step))
    assert not math.isnan(losses.min()), "the smallest rate of a grid does not diverge"
    return heads


def best_head(heads: LinearHeads, features: Tensor, labels: Tensor) -> tuple[int, float]:
    """(number, top-1 accuracy) of the head that does best on these features; the first of several."""
    found = heads.accuracies(features, labels)
    return max(enumerate(found), key=lambda each: each[1])
