"""Methods by name. A module is imported when its method is asked for, so nobody pays for the others."""

import difflib
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vitssl.errors import ConfigError

if TYPE_CHECKING:
    from vitssl.models.spec import EncoderSpec
    from vitssl.models.teacher import Teacher
    from vitssl.objectives.base import Objective

TABLE = {
    "barlow_twins": "vitssl.objectives.barlow_twins:BarlowTwins",
    "byol": "vitssl.objectives.byol:BYOL",
    "can": "vitssl.objectives.can:CAN",
    "cmae": "vitssl.objectives.cmae:CMAE",
    "data2vec": "vitssl.objectives.data2vec:Data2Vec",
    "dino": "vitssl.objectives.dino:DINO",
    "distill": "vitssl.objectives.distill:Distill",
    "ibot": "vitssl.objectives.ibot:IBOT",
    "ijepa": "vitssl.objectives.ijepa:IJEPA",
    "lejepa": "vitssl.objectives.lejepa:LeJEPA",
    "mae": "vitssl.objectives.mae:MAE",
    "moco_v3": "vitssl.objectives.moco_v3:MoCoV3",
    "msn": "vitssl.objectives.msn:MSN",
    "patch_prediction": "vitssl.objectives.patch_prediction:PatchPrediction",
    "simclr": "vitssl.objectives.simclr:SimCLR",
    "simmim": "vitssl.objectives.simmim:SimMIM",
    "vicreg": "vitssl.objectives.vicreg:VICReg",
}
"""name -> module:class"""


def names() -> list[str]:
    """All methods, sorted."""
    return sorted(TABLE)


def find(name: str) -> "type[Objective]":
    """The class of a method. Raises ConfigError with the nearest name for an unknown one."""
    if name not in TABLE:
        near = difflib.get_close_matches(name, TABLE, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(names())}"
        raise ConfigError(f"objectives.{name}: no such objective; {hint}")
    module, _, attribute = TABLE[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def configure(name: str, settings: Mapping[str, Any]) -> Any:
    """A method's validated ``Config`` from plain values. Raises ConfigError with the full key."""
    from vitssl.config import build

    kind = find(name)
    try:
        return build(kind.Config, settings, where=f"objectives.{name}")
    except ConfigError as error:
        raise ConfigError(f"objectives.{name}.{error}") from None


def create(name: str, settings: Mapping[str, Any], spec: "EncoderSpec", *, teacher: "Teacher | None" = None) -> "Objective":
    """A new objective of the run over an encoder with ``spec``; ``teacher``: for one that is taught. Raises ConfigError."""
    kind, config = find(name), configure(name, settings)
    if kind.hides:
        spec.refuse_masks(f"objectives.{name}")
    return kind(config, spec, teacher) if kind.taught else kind(config, spec)
