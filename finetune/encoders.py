"""Frozen encoders by any name: exports and runs, official files, ``timm:TAG``, ``hf:FOLDER``, and networks nobody trained."""

from pathlib import Path
from typing import Any

import torch

from vitssl.interop.ours import create
from vitssl.interop.source import import_weights
from vitssl.models.encoder import Encoder
from vitssl.sections import EncoderConfig
from vitssl.train.export import encoder_like, load_encoder, newest_export

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet, for a network that has seen nothing
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
        return encoder, {"mean": MEAN, "std": STD, "pooling": "class" if encoder.spec.class_token else "mean"}, section
    if kind in ("timm", "hf") or _is_official(Path(name)):
        found = import_weights(name)
        if not changes:
            return found.encoder, found.facts, found.section
        section = found.section.model_copy(update=changes)
        encoder = create(section)
        encoder.load_state(found.encoder.state(), resample=True, grid=found.encoder.spec.grid)
        return encoder, found.facts, section
    encoder, facts = load_encoder(Path(name), **changes)
    return encoder, facts, _section(facts["encoder"], changes)


def _section(values: dict[str, Any], changes: dict[str, Any]) -> EncoderConfig:
    return EncoderConfig.model_validate(values | changes)


def _is_official(path: Path) -> bool:
    """Whether it is a file of weights without the words that an export has beside it."""
    alone = path.suffix == ".safetensors" and path.is_file() and not path.with_name("encoder.json").is_file()
    return alone or path.suffix in (".pth", ".pt", ".tar", ".bin")
