"""The classification heads. At zero they say nothing: the first loss is ln C and the encoder's first gradient exactly 0."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitssl.models.encoder import Tokens
from vitssl.models.spec import Pooling


class ClassificationHead(nn.Module):
    """Pooling, an optional norm after it, dropout and one linear layer, under timm's names ``fc_norm.*`` and ``head.*``.

    ``pooling="mean"`` with ``norm`` is MAE's fine-tuning: the mean over patches of the last block's tokens, then a LayerNorm of
    its own; the encoder must have dropped its final norm (:meth:`Encoder.drop_norm`). ``pooling="class"`` without ``norm``
    takes the class token after the encoder's norm. ``norm=True`` is a LayerNorm with eps 1e-6; a module (what ``drop_norm``
    returned, where a model has another kind or epsilon) is taken over at its initial values.
    ``init="zero"``: weight and bias zero; ``init="trunc_normal"``: weight N(0, ``std``) cut at 2 (absolute), bias zero.
    ``hidden``: a layer of that width and tanh before the last one, as the ViT paper pretrains with (Dosovitskiy et al. 2021,
    section 3.1; ``rep_size`` of the official code); timm's ViT has no place for it.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        pooling: Pooling,
        norm: bool | nn.Module,
        init: Literal["zero", "trunc_normal"] = "zero",
        std: float = 2e-5,
        dropout: float = 0.0,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.pooling, self.hidden = pooling, hidden
        self.fc_norm = norm if isinstance(norm, nn.Module) else nn.LayerNorm(dim, eps=1e-6) if norm else nn.Identity()
        if hasattr(self.fc_norm, "reset_parameters"):
            self.fc_norm.reset_parameters()
        self.dropout = nn.Dropout(dropout)
        self.pre_logits = nn.Identity() if hidden is None else nn.Sequential(_lecun(nn.Linear(dim, hidden)), nn.Tanh())
        self.head = _begun(nn.Linear(hidden or dim, num_classes), init, std)

    def forward(self, tokens: Tokens) -> Tensor:
        """What the encoder returns -> logits [B, num_classes]. Raises ConfigError for a class token that is not there."""
        return self.head(self.dropout(self.pre_logits(self.features(tokens))))

    def features(self, tokens: Tokens) -> Tensor:
        """[B, D]: what the head's first layer sees."""
        return self.fc_norm(tokens.pool(self.pooling))

    @property
    def beyond_timm(self) -> dict[str, Any]:
        """What an export says of a head that timm's plain ViT cannot have, for :func:`head_like`; nothing of one it can."""
        return {} if self.hidden is None else {"hidden": self.hidden}

    @property
    def arguments(self) -> dict[str, Any]:
        """What to lay over ``encoder.arguments`` for ``timm.create_model`` to make the classifier of both."""
        pooling = "avg" if self.pooling == "mean" else "token"
        has_norm = not isinstance(self.fc_norm, nn.Identity)
        return {"num_classes": self.head.out_features, "global_pool": pooling, "fc_norm": has_norm, "final_norm": True}

    def state(self) -> dict[str, Tensor]:
        """The weights under timm's names, to stand beside ``encoder.state()``."""
        return dict(self.state_dict())


class DistilledHead(ClassificationHead):
    """DeiT's two heads (Touvron et al. 2021, section 4): ``head`` on the pooled tokens, ``head_dist`` on the last prefix token.

    That token is the distillation token, and both go through the same norm. The answer is the mean of both heads' logits.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        init: Literal["zero", "trunc_normal"] = "zero",
        std: float = 2e-5,
        **settings: Any,
    ) -> None:
        super().__init__(dim, num_classes, init=init, std=std, **settings)
        self.head_dist = _begun(nn.Linear(dim, num_classes), init, std)

    def forward(self, tokens: Tokens) -> Tensor:
        """What the encoder returns -> logits [B, num_classes]."""
        return torch.stack(self.both(tokens)).mean(dim=0)

    def both(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """(logits that labels teach, logits that a teacher teaches), each [B, num_classes]."""
        return super().forward(tokens), self.head_dist(self.dropout(self.fc_norm(tokens.prefix[:, -1])))

    @property
    def beyond_timm(self) -> dict[str, Any]:
        return {"distilled": True}


def head_like(said: Mapping[str, Any], dim: int, num_classes: int, **settings: Any) -> ClassificationHead:
    """A new head of the kind that an export's ``beyond_timm`` says."""
    kind = DistilledHead if said.get("distilled") else ClassificationHead
    return kind(dim, num_classes, hidden=said.get("hidden"), **settings)


def _begun(layer: nn.Linear, init: Literal["zero", "trunc_normal"], std: float) -> nn.Linear:
    nn.init.zeros_(layer.bias)
    if init == "zero":
        nn.init.zeros_(layer.weight)
    else:
        nn.init.trunc_normal_(layer.weight, std=std)
    return layer


def _lecun(layer: nn.Linear) -> nn.Linear:
    """JAX's default, which the official code relies on: N(0, 1 / fan-in) cut at 2 deviations and widened again, bias zero."""
    std = layer.in_features**-0.5 / 0.87962566103423978
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(layer.bias)
    return layer
