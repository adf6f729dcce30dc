"""Classification, the fine-tuning task: a head on the encoder."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitssl.data.augment import Normalize
from vitssl.dist import rank
from vitssl.draws import fold
from vitssl.errors import ConfigError, DataError
from vitssl.losses.classes import binary_cross_entropy
from vitssl.models.encoder import Encoder
from vitssl.models.heads import ClassificationHead
from vitssl.models.spec import Pooling
from vitssl.models.twin import Twin
from vitssl.objectives.layerwise import layer_decay_rules
from vitssl.plan import Stack
from vitssl.schedule import Clock
from vitssl.sections import Decay
from vitssl.task import Batch, Rule, Task

Mixer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Mode = Literal["full", "partial", "linear"]
Wanted = Pooling | Literal["logits", "averaged logits"]


class Classify(Task):
    """Cross entropy on labels, or on the soft targets of a mixer; ``loss="bce"``: a yes or no for each class instead.

    Labels are [B] numbers, or [B, classes] bool where a sample may have several, which is for ``bce`` alone.

    ``mixup``: images [B, C, H, W], labels [B] -> mixed images, targets [B, classes] (``timm.data.Mixup`` with
    ``label_smoothing=0``: ``smoothing`` is applied here, to whatever the targets are). ``erasing``: normalised images -> the
    same. Both may draw from the global generators of Python, numpy and torch: they are seeded by (seed, step, process) around
    them and put back. ``mode="linear"`` trains the head alone, ``mode="partial"`` also the last ``blocks`` blocks and the
    encoder's norm (He et al. 2022, section 4.3); what is frozen stays in evaluation mode. ``layer_decay``, ``patch_lr`` and
    ``decay``: see :func:`layer_decay_rules`. ``ema``: momentum of an average of encoder and head, kept beside them in ``twin``.

    Raises ConfigError for a number of ``blocks`` that the mode or the encoder does not have.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: ClassificationHead,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        loss: Literal["ce", "bce"] = "ce",
        smoothing: float = 0.0,
        mixup: Mixer | None = None,
        erasing: Callable[[Tensor], Tensor] | None = None,
        mode: Mode = "full",
        blocks: int | None = None,
        layer_decay: float = 1.0,
        patch_lr: float = 1.0,
        decay: Decay = "layers",
        ema: float | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.loss, self.smoothing, self.mixup, self.erasing = loss, smoothing, mixup, erasing
        self.mode, self.rates = mode, {"patch_lr": patch_lr, "decay": decay}
        self.layer_decay = layer_decay
        self.normalize = Normalize(mean, std, channels=encoder.spec.channels)
        self._part = (-1, 0)  # (step, how many forwards it has had): micro-batches of a step mix differently
        self.blocks = _trained_blocks(mode, blocks, encoder.spec.depth)
        self._frozen = self._freeze()
        self.ema = ema
        self.twin = Twin(nn.ModuleDict({"encoder": encoder, "head": head})) if ema is not None else None
        self.train(self.training)

    def train(self, mode: bool = True) -> "Classify":
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def forward(self, batch: Batch, clock: Clock, *, features: Wanted | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """(mean loss, {"top1"} where labels are hard); in evaluation no augmentation, and {"top1", "top5"}.

        The batch has one view. Beside pooled features it can be asked for ``"logits"`` [B, classes], and for those of the
        averaged weights. Raises DataError without labels.
        """
        if features:
            (images,) = batch.views.values()
            return self._wanted(self.normalize(images), features), {}
        if batch.labels is None:
            raise DataError("these samples have no labels; classification needs them: .cls members of shards, or class folders")
        (images,) = batch.views.values()
        images = self.normalize(images)
        if not self.training:
            return self._evaluate(images, batch.labels)
        images, targets = self._augment(images, batch.labels, clock)
        return self._learn(images, targets, batch.labels)

    def stacks(self) -> list[Stack]:
        spec = self.encoder.spec
        return [Stack(spec.prefix + spec.num_patches, spec.dim, self.blocks, spec.heads)]

    def after_step(self, clock: Clock) -> None:
        if self.twin is not None:
            self.twin.update(self.ema)

    @property
    def judged(self) -> tuple[Encoder, ClassificationHead]:
        """Encoder and head of the classifier that is evaluated and exported: the averaged ones where an average is kept."""
        return (self.encoder, self.head) if self.twin is None else (self.twin.average["encoder"], self.twin.average["head"])

    def param_rules(self) -> list[Rule]:
        return layer_decay_rules(self.encoder.spec.depth, self.layer_decay, **self.rates)

    def _freeze(self) -> list[nn.Module]:
        """Take the gradient from what the mode does not train; returns the modules that stay in evaluation mode."""
        if self.mode == "full":
            return []
        self.encoder.requires_grad_(False)
        if self.mode == "linear":
            return [self.encoder]
        vit = self.encoder.vit
        first = len(vit.blocks) - self.blocks
        for part in (*vit.blocks[first:], vit.norm):
            part.requires_grad_(True)
        return [part for part in vit.children() if part is not vit.blocks and part is not vit.norm] + list(vit.blocks[:first])

    def _wanted(self, images: Tensor, what: Wanted) -> Tensor:
        if what == "logits":
            return self._logits(images)
        if what == "averaged logits":
            encoder, head = self.judged
            return head(encoder(images))
        return self.encoder(images).pool(what)

    def _logits(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.blocks > 0):
            tokens = self.encoder(images)
        return self.head(tokens)

    def _learn(self, images: Tensor, targets: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self._on_labels(self._logits(images), targets, labels)

    def _on_labels(self, logits: Tensor, targets: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss on labels, or on what a mixer made of them, and {"top1"} where they are hard."""
        if self.loss == "bce":
            loss = binary_cross_entropy(logits, targets, smoothing=self.smoothing)
        else:
            loss = F.cross_entropy(logits, targets, label_smoothing=self.smoothing)
        return loss, {"top1": _hits(logits, labels, 1).mean()} if targets.ndim == 1 else {}

    def _evaluate(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self._logits(images).float()
        if labels.ndim == 2:
            return binary_cross_entropy(logits, labels), {}
        return F.cross_entropy(logits, labels), {f"top{k}": _hits(logits, labels, k).mean() for k in (1, 5)}

    def _augment(self, images: Tensor, labels: Tensor, clock: Clock) -> tuple[Tensor, Tensor]:
        step, part = self._part
        self._part = (clock.step, part + 1 if step == clock.step else 0)
        if self.mixup is None and self.erasing is None:
            return images, labels
        if self.mixup is not None and len(images) % 2:
            raise DataError(f"mixup pairs the samples of a forward, and this one has {len(images)}; make micro_batch even")
        with seeded(fold(clock.seed, clock.step, rank(), self._part[1]), images.device):
            images = images if self.erasing is None else self.erasing(images)
            if self.mixup is None:
                return images, labels
            return self.mixup(images, labels) if labels.ndim == 1 else _mix_sets(self.mixup, images, labels)


def _trained_blocks(mode: Mode, blocks: int | None, depth: int) -> int:
    """How many blocks of ``depth`` a mode trains."""
    if mode != "partial":
        if blocks is not None:
            raise ConfigError(f"blocks={blocks}: mode={mode} does not choose blocks; take mode=partial, or leave blocks out")
        return depth if mode == "full" else 0
    if blocks is None or blocks > depth:
        given = "has no value" if blocks is None else f"is {blocks}"
        raise ConfigError(f"blocks: {given}, and mode=partial trains the last blocks of {depth}; give blocks=1 to {depth}")
    return blocks


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch (CPU and ``device``) inside, and put them back after."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


def _mix_sets(mixup: Mixer, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Images mixed, and the labels [B, classes] with the same weights: the mixer is told that every sample is its own class."""
    own, mixup.num_classes = mixup.num_classes, len(images)
    try:
        images, weights = mixup(images, torch.arange(len(images), device=images.device))  # weights [B, B]
    finally:
        mixup.num_classes = own
    return images, weights @ labels.to(weights.dtype)


def _hits(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """[B] 1 where the label is among the k largest logits (all of them where there are fewer), without gradient."""
    best = logits.detach().topk(min(k, logits.shape[-1]), dim=-1).indices
    return (best == labels[:, None]).any(dim=-1).to(logits.dtype)
