"""transformers' families that are read and written: their class, their names of tensors, and what timm must know."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vitssl.interop.dinov3 import BASE, without_key_biases
from vitssl.interop.formats import HALF, MEAN, STD
from vitssl.interop.names import BEIT, DATA2VEC, DINOV2, DINOV3, PLAIN, Layout, State, merge_positions
from vitssl.interop.parity import TOLERANCE
from vitssl.interop.shapes import beit_section_of, dinov3_section_of, section_of

BESIDE = ("classifier.", "pooler.", "decoder.", "lm_head.", "embeddings.mask_token")  # what is no part of an encoder


@dataclass(frozen=True)
class Family:
    """``model``: the encoder's class; ``resample``: our name of its rule for other image sizes; ``options``: of its making.

    ``convert`` makes timm's parts of what has timm's names, ``arguments`` says what of the configuration timm must be told.
    """

    model: str
    layout: Layout
    pooling: str
    resample: str = "timm"
    options: Mapping[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    convert: Callable[[State], State] = merge_positions
    section_of: Callable[..., dict[str, Any]] = section_of
    arguments: Callable[[Any], dict[str, Any]] = lambda settings: {}
    tolerance: float = TOLERANCE

    def load_options(self, architectures: list[str]) -> dict[str, Any]:
        """``options``, and for a BEiT of pretraining where its norm stands: before the head, whatever its pooling says."""
        masked = any(name.endswith("ForMaskedImageModeling") for name in architectures) and self.layout is BEIT
        return {**self.options, **({"use_mean_pooling": False} if masked else {})}


def _temperature(settings: Any) -> dict[str, Any]:
    return {} if settings.rope_theta == BASE else {"rope_temperature": float(settings.rope_theta)}


def _of_dinov3(state: State) -> State:
    return without_key_biases({name: tensor for name, tensor in state.items() if tensor.numel()})  # no registers are none


_DINOV3: dict[str, Any] = {
    "convert": _of_dinov3,
    "section_of": dinov3_section_of,
    "arguments": _temperature,
    "tolerance": 1e-6,  # the sides' rotations are float32, rounded in another order
}
_BEIT: dict[str, Any] = {"mean": HALF, "std": HALF, "convert": dict, "section_of": beit_section_of}
FAMILIES = {  # model_type -> family; halves are what its image processor takes where nothing is said
    "vit": Family("ViTModel", PLAIN, "class", "mae", {"add_pooling_layer": False}, HALF, HALF),
    "vit_mae": Family("ViTMAEModel", PLAIN, "mean", "mae"),
    "dinov2": Family("Dinov2Model", DINOV2, "class", "mae"),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", DINOV2, "class", "timm"),
    "dinov3_vit": Family("DINOv3ViTModel", DINOV3, "class", **_DINOV3),
    "ijepa": Family("IJepaModel", PLAIN, "mean", "mae"),
    "beit": Family("BeitModel", BEIT, "mean", **_BEIT),
    "data2vec-vision": Family("Data2VecVisionModel", DATA2VEC, "mean", options={"add_pooling_layer": True}, **_BEIT),
}
