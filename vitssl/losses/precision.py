"""Islands of full precision: logarithms, normalisations and statistics of losses are not for bf16."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Loss = TypeVar("Loss", bound=Callable[..., Any])


def full_precision(loss: Loss) -> Loss:
    """A function of tensors that computes in fp32 at least, whatever precision surrounds it."""

    @functools.wraps(loss)
    def computed(*tensors: Any, **options: Any) -> Any:
        first = next(tensor for tensor in tensors if isinstance(tensor, Tensor))
        with torch.autocast(first.device.type, enabled=False):
            return loss(*(_wide(each) for each in tensors), **{name: _wide(each) for name, each in options.items()})

    return computed


def _wide(value: Any) -> Any:
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    return value.to(torch.promote_types(value.dtype, torch.float32))
