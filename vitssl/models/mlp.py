"""Projectors and predictors: the small networks between an encoder and a loss that compares samples."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from torch import nn

from vitssl.models.norms import BatchNorm

RELU = partial(nn.ReLU, inplace=True)


def mlp(
    widths: Sequence[int],
    *,
    norm: bool = True,
    bias: bool | None = None,
    last: Literal["plain", "norm", "scaled"] = "plain",
    activation: Callable[[], nn.Module] = RELU,
    eps: float = 1e-5,
) -> nn.Sequential:
    """Linear layers of ``widths`` (input first), each but the last followed by BatchNorm over all processes and ``activation``.

    ``last``: what follows the last layer: nothing (it then has a bias), BatchNorm without affine weights (MoCo v3), or with a
    scale and no shift (SimCLR).
    ``bias`` of the layers before a norm; None: where there is no norm. ``eps``: of the norms. Modules are numbered as in the
    official codes of MoCo v3, so those weights load.
    """
    layers: list[nn.Module] = []
    for index, (into, out) in enumerate(itertools.pairwise(widths)):
        final = index == len(widths) - 2
        normed = norm if not final else last != "plain"
        layers.append(nn.Linear(into, out, bias=(not normed) if bias is None else bias))
        if normed:
            layers.append(BatchNorm(out, affine=not final or last == "scaled", eps=eps))
            if final and last == "scaled":
                layers[-1].bias = None
        if not final:
            layers.append(activation())
    return nn.Sequential(*layers)
