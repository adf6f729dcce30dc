"""From a timm name to its adapter: which of them serves it, what our keys are called there, and what is refused.

The module of timm that a name lives in chooses the adapter, since arguments must be named before anything is built; the class
that timm then builds must be the adapter's own.
"""

import difflib
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.layers import HybridEmbed, PatchEmbed
from timm.models import is_model_in_modules
from torch import nn

from vitssl.errors import ConfigError
from vitssl.models.adapters.timm_beit import TimmBeit
from vitssl.models.adapters.timm_eva import TimmEva
from vitssl.models.adapters.timm_vit import TimmViT
from vitssl.models.positions import Grid, ResampleRule
from vitssl.models.stems import TokensToToken

ADAPTERS = {"vision_transformer": TimmViT, "eva": TimmEva, "beit": TimmBeit}
"""timm's module -> adapter. Names of other modules (``deit``) are served where they are plain VisionTransformers."""

KEYS = ("image_size", "patch_size", "channels", "registers", "class_token", "drop_path")
"""Our keys of an encoder that timm has an argument for."""


def adapter_of(name: str) -> type[TimmViT]:
    """The adapter that serves a timm name, if one does."""
    return next((adapter for module, adapter in ADAPTERS.items() if is_model_in_modules(name, (module,))), TimmViT)


def build(
    name: str,
    own: Mapping[str, Any],
    arguments: Mapping[str, Any],
    *,
    pos_resample: ResampleRule,
    drop_path: float = 0.0,
    stem: str | None = None,
) -> tuple[TimmViT, dict[str, Any]]:
    """A freshly initialised adapter without pooling and head, and the arguments by which ``timm.create_model`` makes its like.

    ``own``: values of our :data:`KEYS`, None where the name decides. ``arguments``: further ones of timm. ``stem="t2t"``:
    another in the place of the patch embedding, of which timm knows nothing. Raises ConfigError in one line for what is not
    supported.
    """
    if not timm.is_model(name):
        raise ConfigError(f"encoder.name={name!r}: timm {timm.__version__} has no such model; {_nearest(name)}")
    adapter = adapter_of(name)
    _refuse_own_keys(adapter, arguments)
    hybrid = is_model_in_modules(name, ("vision_transformer_hybrid",))
    if hybrid and own["patch_size"] is not None:
        raise ConfigError(f"encoder.patch_size={own['patch_size']}: the stem of {name} decides it; leave it out")
    given = dict(arguments) | adapter.fixed | _named(adapter, own)
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
    once = {"num_classes": 0, "global_pool": "", adapter.names["fc_norm"]: False, adapter.names["drop_path"]: drop_path}
    try:
        model = timm.create_model(name, **once, **given)
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError, AttributeError) as error:
        with torch.device("meta"):  # another kind of model explains more than its complaint; this costs no memory
            _require_served(timm.create_model(name), adapter, name)
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise ConfigError(f"encoder.name={name!r}: timm cannot build it with {given}: {reason}") from error
    _require_served(model, adapter, name)
    if not len(model.blocks):
        raise ConfigError("encoder.arguments.depth=0: an encoder without a block has nothing to train; take at least 1")
    if stem is not None:
        _replace_stem(model, stem, name=name, image_size=own["image_size"], channels=own["channels"])
    vit = adapter(model, pos_resample=pos_resample)
    pooling = "avg" if vit.cls_token is None else "token"
    return vit, given | {"num_classes": 0, "global_pool": pooling} | vit.norm_arguments(after_pooling=False)


def section_of_arguments(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder section that says what ``timm.create_model(name, **arguments)`` is told, but for pooling and head."""
    adapter = adapter_of(name)
    own = {key: arguments[adapter.names[key]] for key in KEYS if arguments.get(adapter.names.get(key, "")) is not None}
    reserved = _reserved(adapter)
    return {"name": name, **own, "arguments": {key: value for key, value in arguments.items() if key not in reserved}}


def has_norm_after_pooling(name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a classifier made by these arguments normalises after pooling."""
    return bool(arguments.get(adapter_of(name).names["fc_norm"]))


def _named(adapter: type[TimmViT], own: Mapping[str, Any]) -> dict[str, Any]:
    """Our values under timm's names. Raises ConfigError for one that this kind of network does not have."""
    for key, value in own.items():
        if key not in adapter.names and value is not None and value != adapter.always[key]:
            raise ConfigError(
                f"encoder.{key}={value}: timm's {adapter.model.__name__} always has {adapter.always[key]}; leave it out"
            )
    return {adapter.names[key]: value for key, value in own.items() if value is not None and key in adapter.names}


def _reserved(adapter: type[TimmViT]) -> dict[str, str | None]:
    """timm arguments that are not the user's to give: those with a key of their own, and those that the encoder decides."""
    decided = ("num_classes", "global_pool", "patch_drop_rate", "dynamic_img_pad", "pretrained", "checkpoint_path")
    named = {timms: ours if ours in KEYS else None for ours, timms in adapter.names.items()}
    return named | dict.fromkeys((*decided, *adapter.fixed))


def _refuse_own_keys(adapter: type[TimmViT], arguments: Mapping[str, Any]) -> None:
    reserved = _reserved(adapter)
    for key in arguments:
        if key in reserved:
            own = reserved[key]
            advice = f"set encoder.{own}" if own else "the encoder decides it itself: leave it out"
            raise ConfigError(f"encoder.arguments.{key}={arguments[key]!r} is not a further argument of timm; {advice}")


def _require_served(model: nn.Module, adapter: type[TimmViT], name: str) -> None:
    """Raises ConfigError for other models, and for subclasses and stems whose tokens the adapter would not know."""
    if type(model) is not adapter.model or type(model.patch_embed) not in (PatchEmbed, HybridEmbed):
        found = f"{type(model).__name__} with {type(getattr(model, 'patch_embed', None)).__name__}"
        raise ConfigError(
            f"encoder.name={name!r} is a {found}; only a plain VisionTransformer, Eva or Beit is served; {_nearest(name)}"
        )
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules()):
        raise ConfigError(
            f"encoder.name={name!r} has BatchNorms in its stem, which see one micro-batch of one process: the run would depend"
            " on how many there are; take a hybrid without, such as vit_base_r50_s16_224 or vit_small_r26_s32_224"
        )


def _replace_stem(model: nn.Module, stem: str, *, name: str, image_size: Grid, channels: int) -> None:
    assert stem == "t2t", stem
    replaced = type(model.patch_embed).__name__
    side = tuple(model.patch_embed.feat_ratio(as_scalar=False))
    tokens = TokensToToken(image_size, channels=channels, dim=model.embed_dim)
    if replaced != "PatchEmbed" or side != tokens.patch_size:
        raise ConfigError(
            f"encoder.stem=t2t makes a token of 16x16 pixels, and {name} one of {side[0]}x{side[1]} by its {replaced}; take a"
            " plain ViT with encoder.patch_size=16, or leave encoder.stem out"
        )
    model.patch_embed = tokens


def _nearest(name: str) -> str:
    known = [each for module in ADAPTERS for each in timm.list_models(module=module)]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or ["vit_small_patch16_224", "vit_base_patch16_224"]
    return f"the nearest supported: {', '.join(near)}"
