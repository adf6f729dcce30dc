"""Checkpoints of the methods' official codes, as encoders: which tensors are the encoder, and what they are called in timm.

One row a format. Nothing is guessed silently: a tensor that is neither the encoder's nor declared beside it is an error, and a
file that fits several formats asks which is meant. Surprising: DINOv2 with registers adds its first position to the class token
here, because timm keeps no position for it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vitssl.config import build
from vitssl.errors import CheckpointError
from vitssl.interop.files import read_tensors
from vitssl.models.encoder import Encoder
from vitssl.models.positions import Grid
from vitssl.sections import EncoderConfig

State = dict[str, Tensor]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which all of these were trained with
_NAMES = {  # (width, depth) -> timm's name
    (192, 12): "vit_tiny_patch16_224",
    (384, 12): "vit_small_patch16_224",
    (768, 12): "vit_base_patch16_224",
    (1024, 24): "vit_large_patch16_224",
    (1280, 32): "vit_huge_patch14_224",
    (1408, 40): "vit_giant_patch14_224",
    (1536, 40): "vit_giant_patch14_dinov2",
}
_GATED = "vit_giant_patch14_dinov2"  # timm's one plain VisionTransformer whose MLP is gated (SwiGLU)
# Names of an encoder in all of these codes.
_ENCODER = (
    r"cls_token|pos_embed|reg_token|register_tokens|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)"
    r"|blocks\.(\d+\.)?\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.(fc[12]|w12|w3))\.(weight|bias)|blocks\.(\d+\.)?\d+\.ls[12]\.gamma"
)
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


@dataclass(frozen=True)
class Format:
    """``prefixes``: where the encoder may lie, best first; ``has``: a pattern that some name in the file must match.

    ``own``: names below the prefix that are no part of the encoder, ``beside``: names elsewhere in the file, both patterns.
    """

    prefixes: tuple[str, ...]
    own: str
    beside: str
    section: Mapping[str, Any]
    pooling: str
    has: str = r".*"
    convert: Callable[[State], State] = _as_it_is
    heads: Mapping[int, int] = field(default_factory=dict)  # width -> heads, where they are not timm's

    def divide(self, tensors: State) -> "Divided | None":
        """What is what in a file, None where no encoder of this format is in it."""
        for prefix in self.prefixes:
            inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            if "patch_embed.proj.weight" in inside and any(re.fullmatch(self.has, name) for name in tensors):
                encoder = {name: tensor for name, tensor in inside.items() if re.fullmatch(_ENCODER, name)}
                others = [name for name in tensors if name.removeprefix(prefix) not in encoder or not name.startswith(prefix)]
                known = "|".join(filter(None, (rf"{re.escape(prefix)}({self.own})" if self.own else "", self.beside, _ALWAYS)))
                left = [name for name in others if not re.fullmatch(known, name)]
                return Divided(encoder, len(others) - len(left), left)
        return None


@dataclass(frozen=True)
class Divided:
    """A file's tensors: the encoder's, how many are declared beside them, and names that nobody knows."""

    encoder: State
    beside: int
    left: list[str]


_HEADS = r"(student|teacher)\..*|(dino|ibot|koleo)_loss\..*"
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
        heads={384: 12},
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
    "ijepa": Format(
        prefixes=("target_encoder.",),
        own=r"",
        beside=r"(encoder|predictor)\..*",
        section={},
        pooling="mean",
    ),
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


@dataclass(frozen=True)
class Imported:
    """An encoder that was found, how it is built, and how many tensors of the file are what."""

    encoder: Encoder
    section: EncoderConfig
    facts: dict[str, Any]
    coverage: list[tuple[str, int]]


def import_official(path: Path, *, format: str | None = None, heads: int | None = None) -> Imported:
    """The encoder of an official checkpoint. ``heads`` is needed where the width says nothing (64 a head is usual).

    Raises CheckpointError: no format fits, several do, tensors are missing or left over.
    """
    tensors = read_tensors(path)
    if format is not None and format not in FORMATS:
        raise CheckpointError(f"--format {format}: is none of {', '.join(FORMATS)}")
    divided = {name: kind.divide(tensors) for name, kind in FORMATS.items() if format in (None, name)}
    name = format or _recognised(path, tensors, divided)
    kind, found = FORMATS[name], divided[name]
    if found is None:
        raise CheckpointError(f"{path} is no checkpoint of {name}: {_shown(tensors)}; take another format")
    if found.left:
        names = ", ".join(found.left[:4])
        raise CheckpointError(f"{path}: {len(found.left)} tensors belong to no part of {name} ({names}); take another format")
    state = kind.convert(dict(found.encoder))
    values = section_of(state, heads=heads or kind.heads.get(state["patch_embed.proj.weight"].shape[0])) | dict(kind.section)
    section = build(EncoderConfig, values, where=str(path))
    encoder = Encoder.create(section.name, **section.model_dump(exclude={"name"}))
    encoder.load_state(state)
    facts = {"mean": list(MEAN), "std": list(STD), "pooling": kind.pooling, "run": str(path), "format": name}
    return Imported(encoder, section, facts, [("encoder", len(found.encoder)), ("beside it", found.beside)])


def section_of(state: State, *, heads: int | None = None, grid: Grid | None = None) -> dict[str, Any]:
    """The encoder section that builds a network for a state under timm's names. Raises CheckpointError where it cannot.

    ``grid``: rows and columns of its positions, where they are known (default: a square).
    """
    width, channels, *patch = state["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    gated = hidden != state["blocks.0.mlp.fc2.weight"].shape[1]
    name = _NAMES.get((width, depth), "vit_base_patch16_224")
    named = (width, depth) in _NAMES and gated == (name == _GATED)
    name = name if named else _GATED if gated else "vit_base_patch16_224"
    arguments: dict[str, Any] = {} if named else {"embed_dim": width, "depth": depth}
    if heads is None and arguments:
        if width % 64:
            raise CheckpointError(f"a width of {width} does not say how many heads there are; say it with --heads")
        heads = width // 64
    if heads is not None:
        arguments["num_heads"] = heads
    class_token, registers = "cls_token" in state, state["reg_token"].shape[1] if "reg_token" in state else 0
    if not (gated and named):
        arguments |= (
            {} if hidden == 4 * width and name not in (_GATED, "vit_giant_patch14_224") else {"mlp_ratio": hidden / width}
        )
    arguments |= {"init_values": 1e-5} if "blocks.0.ls1.gamma" in state else {}
    arguments |= {} if "blocks.0.attn.qkv.bias" in state else {"qkv_bias": False}
    arguments |= {"no_embed_class": True} if registers else {}
    grid = grid or _grid(state["pos_embed"].shape[1] - (class_token and not registers))
    size = [side * pixels for side, pixels in zip(grid, patch, strict=True)]
    own = {"patch_size": patch, "channels": channels, "registers": registers, "class_token": class_token}
    return {"name": name, "image_size": size, **own, "arguments": arguments}


def _grid(num: int) -> Grid:
    side = round(num**0.5)
    if side * side != num:
        raise CheckpointError(f"{num} positions are no square grid; only those of square images are read")
    return side, side


def _recognised(path: Path, tensors: State, divided: Mapping[str, Divided | None]) -> str:
    """The one format that explains every tensor; of several the one that knows most of them beside the encoder."""
    fitting = {name: found for name, found in divided.items() if found is not None and not found.left}
    said = max((_marks(FORMATS[name], tensors) for name in fitting), default=0)
    most = [name for name in fitting if _marks(FORMATS[name], tensors) == said]
    if len(most) == 1:
        return most[0]
    if not most:
        known = ", ".join(FORMATS)
        raise CheckpointError(f"{path} is of none of the known formats ({known}): {_shown(tensors)}; name one with --format")
    raise CheckpointError(f"{path} may be of {' or '.join(most)}, whose encoders have the same names; say which with --format")


def _marks(kind: Format, tensors: State) -> int:
    """How many tensors only this format has."""
    return sum(bool(kind.own and re.search(rf"(^|\.)({kind.own})$", name)) for name in tensors)


def _shown(tensors: State) -> str:
    return f"{len(tensors):,} tensors such as {', '.join(list(tensors)[:3])}"
