"""Distillation through attention (DeiT, Touvron et al. 2021): a token and a head of its own learn what a teacher says.

Surprising: the teacher is no part of the task's state. It is never trained, so no checkpoint and no export holds it; a run that
goes on loads it again from where its config says.
"""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from vitssl.losses.classes import distillation
from vitssl.models.encoder import Encoder
from vitssl.models.heads import ClassificationHead, DistilledHead
from vitssl.models.teacher import Aside, Teacher
from vitssl.objectives.classify import Classify


class Distilled(Classify):
    """(1 - alpha) x the loss on labels + alpha x the distance to ``teacher``'s answers on the same images.

    With a :class:`DistilledHead` labels teach the first of its two layers and the teacher the second (``hard``: by its first
    choice); with a plain head both teach the same logits (the paper's "usual" distillation).
    """

    def __init__(
        self,
        encoder: Encoder,
        head: ClassificationHead,
        *,
        teacher: Teacher,
        kind: Literal["soft", "hard"],
        temperature: float,
        alpha: float,
        mean: Sequence[float],
        std: Sequence[float],
        **settings: Any,
    ) -> None:
        super().__init__(encoder, head, mean=mean, std=std, **settings)
        self._teacher = Aside(teacher)
        self.kind, self.temperature, self.alpha = kind, temperature, alpha

    def companions(self) -> list[nn.Module]:
        return [self._teacher.network]

    def _learn(self, images: Tensor, targets: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = self.encoder(images)
        on_labels, on_teacher = self.head.both(tokens) if isinstance(self.head, DistilledHead) else [self.head(tokens)] * 2
        answers = self._teacher(self.normalize.pixels(images))
        base, metrics = self._on_labels(on_labels, targets, labels)
        own = distillation(on_teacher, answers, kind=self.kind, temperature=self.temperature)
        agreed = (on_teacher.detach().argmax(dim=-1) == answers.argmax(dim=-1)).to(base.dtype).mean()
        metrics = metrics | {"labels": base.detach(), "teacher": own.detach(), "agreement": agreed}
        return (1 - self.alpha) * base + self.alpha * own, metrics
