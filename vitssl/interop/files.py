"""Reads the tensors of a foreign checkpoint, .safetensors or pickled, without executing anything that lies in it.

Official checkpoints carry their command line and numpy numbers beside the weights; those types do nothing when they are made,
so they are allowed. Anything else is refused by its name.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vitssl.errors import CheckpointError

_WRAPPERS = ("module", "_orig_mod")  # names that DistributedDataParallel and torch.compile put between
_KINDS = [type(np.dtype(kind)) for kind in ("?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "U", "S")]
_INERT = [argparse.Namespace, np.dtype, np.ndarray, np._core.multiarray.scalar, np._core.multiarray._reconstruct, *_KINDS]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """{dotted name: tensor} of everything in a checkpoint, without the wrappers' names.

    Raises CheckpointError: missing, damaged, no checkpoint, or with objects that are not to be made.
    """
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a folder; give a checkpoint's file, or hf:{path} for a model of transformers, timm:{path} for timm's"
            " (an export of ours needs no import)"
        )
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give a .safetensors, .pth, .pt, .pth.tar or .bin file")
    try:
        found = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {str(error).splitlines()[0]}; fetch it again") from None
    tensors: dict[str, Tensor] = {}
    for name, tensor in _flat(found):
        if name in tensors and not torch.equal(tensors[name], tensor):
            raise CheckpointError(
                f"{path} holds two tensors {name}, one below {' or '.join(_WRAPPERS)}; save the one that is meant alone"
            )
        tensors[name] = tensor
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; give a checkpoint's file")
    return tensors


def _unpickled(path: Path) -> Any:
    names = ("scalar", "_reconstruct")
    old = {f"numpy.core.multiarray.{name}": getattr(np._core.multiarray, name) for name in names}  # as numpy 1 called them
    with torch.serialization.safe_globals([*_INERT, *((thing, name) for name, thing in old.items())]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # its own kinds, those of the zip and pickle libraries, and any of damaged bytes
            said = str(error)
    name = said.partition("GLOBAL ")[2].split(" ")[0] or said.partition("but got <class '")[2].split("'")[0]
    if name:
        raise CheckpointError(
            f"{path} holds objects of the kind {name}, which would run code that is not here to be trusted; save its state"
            " dictionary alone, as safetensors"
        )
    raise CheckpointError(f"{path} is damaged or no checkpoint ({' '.join(said.split())[:200]}); fetch it again")


def _flat(values: Any, prefix: str = "") -> Any:
    if isinstance(values, Tensor):
        yield prefix.removesuffix("."), values
    elif isinstance(values, Mapping):
        for name, value in values.items():
            words = ".".join(word for word in str(name).split(".") if word not in _WRAPPERS)
            yield from _flat(value, f"{prefix}{words}." if words else prefix)
