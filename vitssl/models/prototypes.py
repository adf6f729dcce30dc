"""The head of self-distillation: a token's likeness with each of many prototypes (DINO, Caron et al. 2021, appendix C).

The surprising decision: nothing of it is large but the last layer, and that has no bias; so whoever compares takes the rows
before it and the prototypes, and makes as many logits at a time as memory allows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitssl import dist
from vitssl.losses.precision import full_precision
from vitssl.models.mlp import mlp


class Prototypes(nn.Module):
    """``forward()`` -> [P, E]: a direction each (``weight_v``) of length ``weight_g`` (Salimans and Kingma 2016), at first 1.

    With ``fixed_norm`` the length stays 1. The names are those of torch's ``weight_norm``, and so of official weights.
    """

    def __init__(self, num: int, dim: int, *, fixed_norm: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(num, 1), requires_grad=not fixed_norm)
        self.weight_v = nn.Parameter(torch.empty(num, dim).uniform_(-(dim**-0.5), dim**-0.5))  # as an nn.Linear's

    def forward(self) -> Tensor:
        return self.weight_g * F.normalize(self.weight_v, dim=1)


class PrototypeHead(nn.Module):
    """[..., D] -> [..., E] of length 1, in fp32 at least, through an MLP with GELU; ``last_layer()`` are the prototypes [P, E].

    The logits are ``F.linear(head(x), head.last_layer())``. With ``norm`` BatchNorm follows the MLP's hidden layers, and rows
    are [R, D]. Names as in the official codes of DINO and DINOv2 (iBOT calls a second last layer ``last_layer2``).
    """

    def __init__(
        self, dim: int, *, prototypes: int, hidden: int, bottleneck: int, layers: int, fixed_norm: bool, norm: bool = False
    ) -> None:
        super().__init__()
        self.mlp = mlp([dim, *[hidden] * (layers - 1), bottleneck], norm=norm, activation=nn.GELU)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.last_layer = Prototypes(prototypes, bottleneck, fixed_norm=fixed_norm)

    def forward(self, x: Tensor) -> Tensor:
        return on_sphere(self.mlp(x))


def on_sphere(rows: Tensor) -> Tensor:
    """[..., E] -> the same of length 1, in fp32 at least."""
    return F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)


class Centre(nn.Module):
    """The running mean of a teacher's logits, which its assignments are freed of (DINO, equation 4).

    A step's assignments use the mean of the steps before. What it shows is summed over micro-batches and processes until
    :meth:`follow`, so the batch may come in any number of parts.
    """

    def __init__(self, num: int, *, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("centre", torch.zeros(num))
        self._seen: Tensor | None = None  # [P + 1]: sum of logits, and of how many rows; no state: a step ends it

    @torch.no_grad()
    def see(self, rows: Tensor, prototypes: Tensor) -> None:
        """Rows [R, E] of this step, before prototypes [P, E]: as logits are linear, their sum needs none of them."""
        seen = torch.cat([_logits(rows.sum(dim=0), prototypes), prototypes.new_full((1,), len(rows))])
        self._seen = seen if self._seen is None else self._seen + seen

    @torch.no_grad()
    def follow(self) -> None:
        """After the step: move towards the mean of what was seen; of nothing, stay."""
        if self._seen is None:
            return
        *_, count = seen = dist.sum_over_processes(self._seen)
        mean = torch.where(count > 0, seen[:-1] / count.clamp(min=1), self.centre)
        self.centre.lerp_(mean.to(self.centre.dtype), 1 - self.momentum)
        self._seen = None


@full_precision
def _logits(row: Tensor, prototypes: Tensor) -> Tensor:
    return prototypes @ row
