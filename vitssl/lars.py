"""LARS: each layer's step is a share of the size of its weights (You et al. 2017), as in MoCo v3, Barlow Twins and VICReg.

Surprising: the momentum holds steps that the learning rate has not scaled, so a change of the rate changes what is remembered
too; vectors (biases, norms) are not scaled.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def trust_ratios(weights: Tensor, updates: Tensor, trust: float) -> Tensor:
    """[G] by how much each of G layers' steps is scaled: ``trust`` x |weights| / |updates|, or 1 where a norm is 0.

    weights, updates: [G, ...].
    """
    size, step = weights.flatten(1).norm(dim=1), updates.flatten(1).norm(dim=1)
    return torch.where((size > 0) & (step > 0), trust * size / step, 1.0)


class LARS(torch.optim.Optimizer):
    """Heavy-ball momentum over decayed gradients, those of matrices scaled by :func:`trust_ratios`.

    ``weight_decay`` is a group's; MoCo v3's own decays no vectors, which is what its rules say here.
    """

    def __init__(self, params: Iterable[Any], *, lr: float, momentum: float = 0.9, trust: float = 0.001) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        """Move every parameter that has a gradient."""
        assert closure is None, "nobody here computes the loss again"
        for group in self.param_groups:
            for weights in (each for each in group["params"] if each.grad is not None):
                update = weights.grad.add(weights, alpha=group["weight_decay"])
                if weights.ndim > 1:
                    update *= trust_ratios(weights[None], update[None], group["trust"])
                state = self.state[weights]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weights)
                state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                weights.add_(state["momentum_buffer"], alpha=-group["lr"])
