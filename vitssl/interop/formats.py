"""Official formats as a table: where the encoder lies in a file, what stands beside it, what its tensors are called in timm.

One row a format. Surprising: DINOv2 with registers adds its first position to the class token here, because timm keeps no
position for it; a fine-tuned BEiT's norm after pooling becomes the encoder's final norm.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vitssl.interop.dinov3 import of_official, rotations
from vitssl.interop.shapes import State, beit_section_of, clip_section_of, dinov3_section_of, section_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which most of these were trained with
HALF = (0.5, 0.5, 0.5)
# Names of an encoder in most of these codes.
_ENCODER = (
    r"cls_token|pos_embed|reg_token|register_tokens|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)"
    r"|blocks\.(\d+\.)?\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.(fc[12]|w12|w3))\.(weight|bias)|blocks\.(\d+\.)?\d+\.ls[12]\.gamma"
)
_BLOCK = r"norm[12]\.(weight|bias)|attn\.(qkv\.weight|proj\.(weight|bias))"
_DINOV3 = (
    r"cls_token|storage_tokens|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)|rope_embed\.periods"
    rf"|blocks\.\d+\.({_BLOCK}|attn\.qkv\.bias(_mask)?|ls[12]\.gamma|mlp\.(fc[12]|w[123])\.(weight|bias))"
)
_BEIT = (
    r"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|(fc_)?norm\.(weight|bias)"
    rf"|blocks\.\d+\.({_BLOCK}|attn\.[qv]_bias|gamma_[12]|mlp\.fc[12]\.(weight|bias)|attn\.relative_position_bias_table)"
    r"|rel_pos_bias\.relative_position_bias_table"
)
_CLIP = (
    r"class_embedding|positional_embedding|conv1\.weight|ln_(pre|post)\.(weight|bias)"
    r"|transformer\.resblocks\.\d+\.(ln_[12]\.|attn\.in_proj_|attn\.out_proj\.|mlp\.c_(fc|proj)\.)(weight|bias)"
)
_CLIP_NAMES = {
    "conv1.": "patch_embed.proj.",
    "transformer.resblocks.": "blocks.",
    "ln_pre.": "norm_pre.",
    "ln_post.": "norm.",
    ".ln_": ".norm",
    ".in_proj_": ".qkv.",
    ".out_proj.": ".proj.",
    ".c_fc.": ".fc1.",
    ".c_proj.": ".fc2.",
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
}
_ALWAYS = (
    r"(optimizer|optim|opt|scaler|fp16_scaler|amp|epoch|iteration|lr|loss|args)(\..*)?"  # beside the weights, in any of them
)


def _as_it_is(state: State) -> State:
    return state


def _of_dinov2(state: State) -> State:
    """Chunks of blocks joined, timm's names for the gated MLP, and registers as timm has them."""
    names = {name: re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name) for name in state}
    names = {old: new.replace("mlp.w12.", "mlp.fc1.").replace("mlp.w3.", "mlp.fc2.") for old, new in names.items()}
    state = {names[name]: tensor for name, tensor in state.items()}
    if "register_tokens" in state:
        positions = state.pop("pos_embed")
        state |= {"reg_token": state.pop("register_tokens"), "pos_embed": positions[:, 1:]}
        state["cls_token"] = state["cls_token"] + positions[:, :1]
    return state


def _of_beit(state: State) -> State:
    return {name.replace("fc_norm.", "norm."): tensor for name, tensor in state.items()}


def _of_clip(state: State) -> State:
    found: State = {}
    for name, tensor in state.items():
        for theirs, ours in _CLIP_NAMES.items():
            name = name.replace(theirs, ours)
        found[name] = tensor.reshape(1, -1, tensor.shape[-1]) if name in ("cls_token", "pos_embed") else tensor
    return found


def _width_heads(known: Mapping[int, int], stem: str = "patch_embed.proj.weight") -> Callable[[State], int | None]:
    """Heads by the width of the patch embedding, where they are not timm's."""
    return lambda state: known.get(state[stem].shape[0])


@dataclass(frozen=True)
class Format:
    """``prefixes``: where the encoder may lie, best first; ``has``: a pattern that some name in the file must match.

    ``own``: names below the prefix that are no part of the encoder, ``beside``: names elsewhere in the file, both patterns.
    ``encoder``: names of the encoder below the prefix, a pattern. ``convert`` gives them timm's names, of which ``section_of``
    reads the network's shape; ``heads`` and ``remarks`` (what of the file is not taken over as it is) look at the file's own.
    """

    prefixes: tuple[str, ...]
    own: str
    beside: str
    section: Mapping[str, Any]
    pooling: str
    has: str = r".*"
    convert: Callable[[State], State] = _as_it_is
    heads: Callable[[State], int | None] = lambda state: None
    stem: str = "patch_embed.proj.weight"  # the one tensor by which an encoder is known to be there
    encoder: str = _ENCODER
    section_of: Callable[..., dict[str, Any]] = section_of
    remarks: Callable[[State], dict[str, str]] = lambda state: {}
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def divide(self, tensors: State) -> "Divided | None":
        """What is what in a file, None where no encoder of this format is in it."""
        for prefix in self.prefixes:
            inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            if self.stem in inside and any(re.fullmatch(self.has, name) for name in tensors):
                encoder = {name: tensor for name, tensor in inside.items() if re.fullmatch(self.encoder, name)}
                others = [name for name in tensors if name.removeprefix(prefix) not in encoder or not name.startswith(prefix)]
                left = [name for name in others if not self._declares(name, prefix)]
                return Divided(encoder, len(others) - len(left), left)
        return None

    def _declares(self, name: str, prefix: str) -> bool:
        """Whether a tensor that is none of the encoder's is known to stand where it stands."""
        if prefix and name.startswith(prefix):
            return bool(re.fullmatch(self.own, name.removeprefix(prefix)))
        return bool(re.fullmatch(rf"{self.beside}|{_ALWAYS}" if prefix else rf"{self.own}|{self.beside}|{_ALWAYS}", name))


@dataclass(frozen=True)
class Divided:
    """A file's tensors: the encoder's, how many are declared beside them, and names that nobody knows."""

    encoder: State
    beside: int
    left: list[str]


_HEADS = r"(student|teacher)\..*|(dino|ibot|koleo)_loss\..*"
_TABLE = r".*relative_position_bias_table"
_RELATIVE: dict[str, Any] = {
    "own": r"mask_token|lm_head\..*|cls_pt_(layers|lm_head)\..*|head\..*|.*relative_position_index",
    "beside": r"(model\.)?decoder\.0\.(weight|bias)|model_ema\..*",
    "section": {},
    "pooling": "mean",
    "convert": _of_beit,
    "encoder": _BEIT,
    "section_of": beit_section_of,
}
_TOWERS: dict[str, Any] = {
    "prefixes": ("visual.", "state_dict.visual."),
    "own": "proj",
    "beside": r"(state_dict\.)?(positional_embedding|text_projection|logit_(scale|bias)|attn_mask|context_length|vocab_size"
    r"|input_resolution|token_embedding\.weight|ln_final\.(weight|bias)|transformer\.resblocks\..*|text\..*)",
    "pooling": "class",
    "convert": _of_clip,
    "heads": _width_heads({1280: 16, 1408: 16, 1664: 16}, "conv1.weight"),
    "stem": "conv1.weight",
    "encoder": _CLIP,
    "section_of": clip_section_of,
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
FORMATS = {
    "mae": Format(
        prefixes=("model.",),
        own=r"decoder_.*|mask_token",
        beside="",
        section={"pos_resample": "mae"},
        pooling="mean",
    ),
    "moco_v3": Format(
        prefixes=("state_dict.base_encoder.",),
        own=r"head\..*",
        beside=r"state_dict\.(momentum_encoder|predictor)\..*",
        section={},
        pooling="class",
        heads=_width_heads({384: 12}),
    ),
    "dino": Format(
        prefixes=("teacher.backbone.", ""),
        own=r"",
        beside=_HEADS,
        section={"pos_resample": "dino"},
        pooling="class",
    ),
    "ibot": Format(
        prefixes=("teacher.backbone.", "state_dict."),
        has=r"student\..*\.masked_embed|state_dict\.pos_embed",
        own=r"masked_embed",
        beside=_HEADS,
        section={"pos_resample": "dino"},
        pooling="class",
    ),
    "dinov2": Format(
        prefixes=("teacher.backbone.", "model.backbone.", "model.", ""),
        has=r".*\.ls1\.gamma",
        own=r"mask_token",
        beside=_HEADS + r"|teacher\..*head.*",
        section={"pos_resample": "dino"},
        pooling="class",
        convert=_of_dinov2,
    ),
    "dinov3": Format(
        prefixes=("teacher.backbone.", "model.backbone.", "model.", ""),
        has=r".*rope_embed\.periods",
        own=r"mask_token|local_cls_norm\.(weight|bias)",  # the norm that only small crops passed in training
        beside=_HEADS + r"|teacher\..*head.*",
        section={},
        pooling="class",
        convert=of_official,
        heads=lambda state: state["patch_embed.proj.weight"].shape[0] // (4 * len(state["rope_embed.periods"])),
        encoder=_DINOV3,
        section_of=dinov3_section_of,
        remarks=rotations,
    ),
    "ijepa": Format(
        prefixes=("target_encoder.",),
        own=r"",
        beside=r"(encoder|predictor)\..*",
        section={},
        pooling="mean",
    ),
    "simmim": Format(prefixes=("model.encoder.", "encoder."), has=r"(model\.)?decoder\.0\.weight", **_RELATIVE),
    "beit": Format(prefixes=("model.", ""), has=_TABLE, mean=HALF, std=HALF, **_RELATIVE),
    "beit_v2": Format(prefixes=("model.", ""), has=_TABLE, **_RELATIVE),
    "data2vec": Format(prefixes=("model.", ""), has=_TABLE, **_RELATIVE),
    "open_clip": Format(section={}, **_TOWERS),
    "openai_clip": Format(section={"name": "vit_base_patch16_clip_quickgelu_224"}, **_TOWERS),
    "timm": Format(prefixes=("",), own=r"head\..*|fc_norm\..*", beside="", section={}, pooling="class"),
    "deit": Format(
        prefixes=("model.",),
        has=r"model\.head\.weight",
        own=r"head\..*",
        beside="",
        section={},
        pooling="class",
    ),
}
