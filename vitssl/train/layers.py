"""What is kept of an image that an encoder has looked at: which tokens, of which block, before or after the final norm.

Surprising: the final norm was trained on the last block's output alone, yet it is applied to earlier blocks too unless told
otherwise, as DINOv2's and timm's intermediate layers are: without it the widths of tokens differ a hundredfold.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitssl.models.encoder import Encoder, Tokens
from vitssl.models.spec import EncoderSpec

KINDS = ("class", "mean", "patches", "class_4")
_BLOCKS = 4  # of class_4


@dataclass(frozen=True)
class Feature:
    """``kind``: the class token [D], the mean over patch tokens [D], all patch tokens [N, D], or DINO's ``class_4``, the class
    tokens of the last four blocks, each after the final norm, end to end [4 D].

    ``layer`` k is the output of block k, 1 to depth (None: the last); ``norm``: whether the final norm is applied to it.
    """

    kind: str
    layer: int | None = None
    norm: bool = True

    @property
    def name(self) -> str:
        """Of files and columns: ``mean``, ``mean_layer6``, ``mean_layer6_raw``."""
        layer = "" if self.layer is None else f"_layer{self.layer}"
        return f"{self.kind}{layer}{'' if self.norm else '_raw'}"

    def blocks(self, spec: EncoderSpec) -> int:
        """How many of the last blocks' outputs it is made of (``last_blocks`` of :class:`Encoder`)."""
        if self.kind == "class_4":
            return min(_BLOCKS, spec.depth)
        layer = spec.depth if self.layer is None else self.layer
        return 0 if layer == spec.depth and self.norm else spec.depth - layer + 1

    def shape(self, spec: EncoderSpec) -> tuple[int, ...]:
        """Of one image."""
        if self.kind == "patches":
            return spec.num_patches, spec.dim
        return (self.blocks(spec) * spec.dim if self.kind == "class_4" else spec.dim,)

    def of(self, encoder: Encoder, tokens: Tokens) -> Tensor:
        """[B, *shape] of tokens that hold as many blocks as :meth:`blocks` asks for, or more."""
        if self.kind == "class_4":
            last = tokens.blocks[-self.blocks(encoder.spec) :]
            return torch.cat([encoder.norm(block).pool("class") for block in last], dim=1)
        back = self.blocks(encoder.spec)
        found = tokens if not back else encoder.norm(tokens.blocks[-back]) if self.norm else tokens.blocks[-back]
        return found.patches if self.kind == "patches" else found.pool(self.kind)
