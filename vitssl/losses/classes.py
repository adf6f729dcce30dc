"""Classes: what labels say, and what another classifier says. B images."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def binary_cross_entropy(logits: Tensor, targets: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Scalar: each class a question of its own, mean over all B x classes numbers, in nats (a zero head: ln 2).

    logits [B, classes]; targets [B] int64, or [B, classes] in [0, 1]. ``smoothing`` s makes them t (1 - s) + s / classes, as
    timm does (Wightman et al. 2021, section 4.1; DeiT III, Touvron et al. 2022).
    """
    hot = F.one_hot(targets, logits.shape[-1]) if targets.ndim == 1 else targets
    hot = hot.to(logits.dtype) * (1 - smoothing) + smoothing / logits.shape[-1]
    return F.binary_cross_entropy_with_logits(logits, hot)


def distillation(logits: Tensor, teacher: Tensor, *, kind: Literal["soft", "hard"], temperature: float = 1.0) -> Tensor:
    """Scalar: how far logits [B, classes] are from a teacher's [B, classes], which get no gradient. In nats.

    ``soft``: KL(teacher || student) at ``temperature``, times its square, mean over all B x classes numbers (not over B: the
    official code of DeiT divides by both). ``hard``: cross entropy with the teacher's first choice. Touvron et al. 2021,
    section 4; weigh it against the loss on labels as (1 - alpha) x base + alpha x this.
    """
    teacher = teacher.detach()
    if kind == "hard":
        return F.cross_entropy(logits, teacher.argmax(dim=-1))
    log_p, log_q = (F.log_softmax(each / temperature, dim=-1) for each in (logits, teacher))
    return F.kl_div(log_p, log_q, reduction="sum", log_target=True) * temperature**2 / logits.numel()
