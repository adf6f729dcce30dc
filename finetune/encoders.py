"""Encoders by any name: exports and runs, official files, ``timm:TAG``, ``hf:FOLDER``, and networks nobody trained."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from vitssl.interop.formats import MEAN, STD
from vitssl.interop.ours import create
from vitssl.interop.source import is_foreign, named_weights
from vitssl.models.encoder import Encoder
from vitssl.sections import EncoderConfig
from vitssl.train.export import Held, encoder_facts, encoder_like, load_encoder, newest_export

Size = int | tuple[int, int]


def open_encoder(name: str, *, image_size: Size | None = None) -> tuple[Encoder, dict[str, Any], EncoderConfig]:
    """(the encoder that ``name`` means, its facts: ``mean``, ``std`` and ``pooling``, the section that builds it).

    ``newest`` is the last export below ``runs``; behind ``random:`` stands an export or a name of timm, and what is returned is
    that network with new weights, which any training has to beat. ``image_size`` resamples positions by the encoder's own
    rule. Raises CheckpointError and ConfigError.
    """
    changes = {} if image_size is None else {"image_size": image_size}
    name = str(newest_export(Path("runs"))) if name == "newest" else name
    kind, _, rest = name.partition(":")
    if kind == "random":
        torch.manual_seed(0)
        if Path(rest).exists():
            encoder, facts = encoder_like(Path(rest), **changes)
            return encoder, facts, _section(facts["encoder"], changes)
        section = EncoderConfig(name=rest, **changes)
        encoder = create(section)
        return (
            encoder,
            {"mean": list(MEAN), "std": list(STD), "pooling": "class" if encoder.spec.class_token else "mean"},
            section,
        )
    if is_foreign(name):
        found = named_weights("encoder", name)
        if not changes:
            return found.encoder, found.facts, found.section
        section = found.section.model_copy(update=changes)
        encoder = create(section)
        encoder.load_state(found.encoder.state(), resample=True, grid=found.encoder.spec.grid)
        return encoder, found.facts, section
    encoder, facts = load_encoder(Path(name), **changes)
    return encoder, facts, _section(facts["encoder"], changes)


@lru_cache(maxsize=1)
def origin_of(name: str) -> Path | Held:
    """What a training begins from: an export's path, or somebody else's weights, read once. Raises CheckpointError."""
    if not is_foreign(name):
        return Path(name)
    found = named_weights("encoder", name)
    return Held(name, found.encoder.state(), encoder_facts(found.encoder, found.section, **found.facts))


def _section(values: dict[str, Any], changes: dict[str, Any]) -> EncoderConfig:
    return EncoderConfig.model_validate(values | changes)
