"""The decoder of a masked autoencoder beside its encoder, under transformers' names, and what the two paint together."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vitssl.errors import CheckpointError
from vitssl.interop.names import BLOCK, Layout, State, foreign
from vitssl.models.encoder import Encoder
from vitssl.models.predictor import Decoder
from vitssl.models.spec import EncoderSpec
from vitssl.models.state import require_fit

_OUTSIDE = {
    "embed.": "decoder.decoder_embed.",
    "mask_token": "decoder.mask_token",
    "norm.": "decoder.decoder_norm.",
    "predict.": "decoder.decoder_pred.",
}
_LAYOUT = Layout("decoder.decoder_layers", BLOCK)


@dataclass(frozen=True)
class Painter:
    """A decoder's state under its own names, and what the state does not say."""

    state: Mapping[str, Tensor]
    heads: int
    mask_ratio: float
    norm_pix: bool

    def settings(self) -> dict[str, Any]:
        """What transformers' ViTMAE needs to know of it."""
        return {
            "decoder_hidden_size": self.state["embed.weight"].shape[0],
            "decoder_num_hidden_layers": self._depth,
            "decoder_num_attention_heads": self.heads,
            "decoder_intermediate_size": self.state["blocks.0.mlp.fc1.weight"].shape[0],
            "mask_ratio": self.mask_ratio,
            "norm_pix_loss": self.norm_pix,
        }

    def network(self, spec: EncoderSpec) -> Decoder:
        """The decoder, filled. Raises CheckpointError where it does not belong to such an encoder."""
        dim, inner = self.state["embed.weight"].shape[0], self.state["blocks.0.mlp.fc1.weight"].shape[0]
        sizes = {"dim": dim, "depth": self._depth, "heads": self.heads, "mlp_ratio": inner / dim}
        positions = "learned" if "pos_embed" in self.state else "sincos"
        decoder = Decoder(spec, **sizes, positions=positions, out=self.state["predict.weight"].shape[0])
        require_fit(self.state, decoder.state_dict(), model="the decoder of this encoder")
        decoder.load_state_dict(dict(self.state))
        return decoder.eval()

    def foreign(self, decoder: Decoder) -> State:
        """The decoder's tensors under transformers' names, its positions among them."""
        blocks = {name: tensor for name, tensor in self.state.items() if name.startswith("blocks.")}
        found = foreign(blocks, _LAYOUT)
        for name, tensor in self.state.items():
            for ours, theirs in _OUTSIDE.items():
                if name.startswith(ours):
                    found[theirs + name.removeprefix(ours)] = tensor
        found["decoder.decoder_pos_embed"] = decoder.pos_embed.detach().float()
        return found

    def paint(self, encoder: Encoder, decoder: Decoder, images: Tensor, noise: Tensor) -> Tensor:
        """images [B, C, H, W], noise [B, N] -> predicted patches [B, N, P]. Patches of least noise are kept, as in MAE."""
        num = int(noise.shape[1] * (1 - self.mask_ratio))
        keep = noise.argsort(dim=1)[:, :num]
        return decoder(encoder(images, keep=keep), keep)

    def refuse(self, family: str) -> None:
        """Raise CheckpointError for an encoder that is no plain ViT with one class token."""
        if family != "vit":
            raise CheckpointError(
                "transformers' ViTMAE has one class token, no registers and no layer scale, and this encoder is another kind;"
                " leave --decoder out, or export it --to timm"
            )

    @property
    def _depth(self) -> int:
        return 1 + max(int(name.split(".")[1]) for name in self.state if name.startswith("blocks."))
