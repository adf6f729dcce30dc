"""The classification head. At zero it says nothing: the first loss is ln C and the encoder's first gradient exactly 0."""

from typing import Any, Literal

from torch import Tensor, nn

from vitssl.models.encoder import Pooling, Tokens


class ClassificationHead(nn.Module):
    """Pooling, an optional norm after it, dropout and one linear layer, under timm's names ``fc_norm.*`` and ``head.*``.

    ``pooling="mean"`` with ``norm`` is MAE's fine-tuning: the mean over patches of the last block's tokens, then a LayerNorm of
    its own; the encoder must have dropped its final norm (:meth:`Encoder.drop_norm`). ``pooling="class"`` without ``norm``
    takes the class token after the encoder's norm. ``norm=True`` is a LayerNorm with eps 1e-6; a module (what ``drop_norm``
    returned, where a model has another kind or epsilon) is taken over at its initial values.
    ``init="zero"``: weight and bias zero; ``init="trunc_normal"``: weight N(0, ``std``) cut at 2 (absolute), bias zero.
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
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.fc_norm = norm if isinstance(norm, nn.Module) else nn.LayerNorm(dim, eps=1e-6) if norm else nn.Identity()
        if hasattr(self.fc_norm, "reset_parameters"):
            self.fc_norm.reset_parameters()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(dim, num_classes)
        nn.init.zeros_(self.head.bias)
        if init == "zero":
            nn.init.zeros_(self.head.weight)
        else:
            nn.init.trunc_normal_(self.head.weight, std=std)

    def forward(self, tokens: Tokens) -> Tensor:
        """What the encoder returns -> logits [B, num_classes]. Raises ConfigError for a class token that is not there."""
        return self.head(self.dropout(self.features(tokens)))

    def features(self, tokens: Tokens) -> Tensor:
        """[B, D]: what the linear layer sees."""
        return self.fc_norm(tokens.pool(self.pooling))

    @property
    def arguments(self) -> dict[str, Any]:
        """What to lay over ``encoder.arguments`` for ``timm.create_model`` to make the classifier of both."""
        pooling = "avg" if self.pooling == "mean" else "token"
        has_norm = not isinstance(self.fc_norm, nn.Identity)
        return {"num_classes": self.head.out_features, "global_pool": pooling, "fc_norm": has_norm, "final_norm": True}

    def state(self) -> dict[str, Tensor]:
        """The weights under timm's names, to stand beside ``encoder.state()``."""
        return dict(self.state_dict())
