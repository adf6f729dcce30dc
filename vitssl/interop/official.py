"""Checkpoints of the methods' official codes, as encoders: which format a file is of, and the network it makes.

Nothing is guessed silently: a tensor that is neither the encoder's nor declared beside it is an error, and a file that fits
several formats asks which is meant.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitssl.config import build
from vitssl.errors import CheckpointError
from vitssl.interop.files import read_tensors
from vitssl.interop.formats import FORMATS, Divided, Format
from vitssl.interop.shapes import State
from vitssl.models.encoder import Encoder
from vitssl.sections import EncoderConfig


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
    if heads is not None and heads < 1:
        raise CheckpointError(f"--heads {heads}: is no number of attention heads; give 1 or more")
    if odd := [name for name, tensor in found.encoder.items() if not tensor.is_floating_point()]:
        raise CheckpointError(f"{path}: {odd[0]} holds whole numbers, not weights; give the checkpoint before it was quantised")
    try:
        state = kind.convert(dict(found.encoder))
        values = kind.section_of(state, heads=heads or kind.heads(found.encoder)) | dict(kind.section)
    except (KeyError, ValueError, IndexError, TypeError, RuntimeError) as error:  # what is read is missing, or of no such shape
        missing = f"{error.args[0]} is missing" if isinstance(error, KeyError) else "tensors are missing or of other shapes"
        raise CheckpointError(f"{path}: is no whole checkpoint of {name}: {missing}; fetch it again") from None
    section = build(EncoderConfig, values, where=str(path))
    encoder = Encoder.create(section.name, **section.model_dump(exclude={"name"}))
    encoder.load_state(state)
    mean, std = (statistics_for(values, section.channels) for values in (kind.mean, kind.std))
    facts = {"mean": mean, "std": std, "pooling": kind.pooling, "run": str(path), "format": name}
    facts |= kind.remarks(found.encoder)
    return Imported(encoder, section, facts, [("encoder", len(found.encoder)), ("beside it", found.beside)])


def statistics_for(values: Sequence[float], channels: int) -> list[float]:
    """Statistics of colours, or their mean for every channel where there are not as many as channels."""
    values = [float(value) for value in values]
    return values if len(values) == channels else [sum(values) / len(values)] * channels


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
