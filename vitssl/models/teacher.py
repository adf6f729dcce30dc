"""A frozen network that a student learns from: a classifier of timm or of ours, or an encoder, whatever it was normalised and
sized for.

Surprising: what it is shown are the student's images as the loss sees them, mixed and erased (Touvron et al. 2021, as in the
official code), so its answers are about the same pixels as the targets.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitssl.errors import CheckpointError, ConfigError
from vitssl.models.encoder import Tokens
from vitssl.models.positions import Grid
from vitssl.models.state import require_fit


class Aside(nn.Module):
    """A place in a task for a network that the task uses and neither trains, counts nor saves, and that goes where it goes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._network = (network,)  # a tuple hides it from torch, which would train, count and save it

    @property
    def network(self) -> nn.Module:
        return self._network[0]

    def forward(self, *inputs: Any) -> Any:
        return self.network(*inputs)

    def _apply(self, fn: Callable, recurse: bool = True) -> "Aside":
        self.network._apply(fn)
        return super()._apply(fn, recurse)


class Teacher(nn.Module):
    """``network``: images [B, C, *size] by ``mean`` and ``std`` -> logits [B, classes], or an encoder's tokens; frozen and in
    evaluation mode for good.

    ``num_classes``: that it tells apart, of a classifier. ``columns``: which of its logits stands for which class of the
    student, where their orders differ.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        size: Grid,
        num_classes: int | None = None,
        columns: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.size, self.num_classes, self.channels = tuple(size), num_classes, len(mean)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.register_buffer("columns", None if columns is None else torch.tensor(columns))

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor | Tokens:
        """[B, C, H, W] in units of [0, 1] -> what the network says. Images of other sizes than its own are resized, bicubic."""
        if tuple(pixels.shape[-2:]) != self.size:
            pixels = F.interpolate(pixels, size=self.size, mode="bicubic", antialias=True)
        answer = self.network((pixels - self.mean) / self.std)
        return answer if self.columns is None else answer[:, self.columns]

    def sees(self, size: Grid) -> str:
        """In words: what it is shown of a student's images of ``size`` (height, width)."""
        own, seen = ("x".join(map(str, each)) for each in (self.size, size))
        return "the student's images, " + ("as they are" if own == seen else f"resized from {seen} to {own}, bicubic")


def timm_network(
    name: str, state: Mapping[str, Tensor] | None = None, *, key: str = "teacher"
) -> tuple[nn.Module, dict[str, Any]]:
    """(a timm classifier, its pretrained configuration). ``name``: a model or tag of timm's, or ``local-dir:FOLDER``.

    ``key``: the section of the config that names it, for messages. ``state`` are its weights; without, timm
    fetches its own. Raises ConfigError for a name that timm does not have, CheckpointError for weights that cannot be had or
    do not fit.
    """
    if not (name.startswith("local-dir:") or timm.is_model(name.partition(".")[0])):
        raise ConfigError(f"{key}.name={name!r}: is no model of timm {timm.__version__} and no folder that is there")
    try:
        if state is None:
            model = timm.create_model(name, pretrained=True)
            return model, model.pretrained_cfg
        known = timm.get_pretrained_cfg(name)
        last = known.classifier if known else None
        last = last[0] if isinstance(last, tuple | list) else last
        found = state.get(f"{last}.weight")
        model = timm.create_model(name, **({} if found is None else {"num_classes": len(found)}))
    except Exception as error:  # timm's, the hub client's and the network's own kinds
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise CheckpointError(
            f"{key}.name={name}: timm {timm.__version__} cannot load it: {reason}; give its file as {key}.weights"
        ) from error
    require_fit(state, model.state_dict(), model=f"{key}.name={name}")
    model.load_state_dict(state, strict=True)
    return model, model.pretrained_cfg
