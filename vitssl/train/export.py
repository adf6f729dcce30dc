"""Export: weights under timm's names in safetensors, and beside them the JSON that says how to build and feed the model.

``encoder.safetensors`` + ``encoder.json`` is where pretraining ends and fine-tuning begins; a classifier is written the same
way. Two lines of plain timm load either:

    facts = json.load(open("export/encoder.json"))
    model = timm.create_model(facts["architecture"], **facts["arguments"], checkpoint_path="export/encoder.safetensors")
"""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitssl.errors import CheckpointError
from vitssl.models.encoder import Encoder
from vitssl.sections import EncoderConfig

NEEDED = ("architecture", "arguments", "image_size", "mean", "std", "pooling")


def write_export(folder: Path, name: str, state: dict[str, Tensor], facts: dict[str, Any]) -> Path:
    """Write ``name.safetensors`` and ``name.json`` into ``folder``, each replaced atomically; returns the weights' path."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, words = folder / f"{name}.safetensors", folder / f"{name}.json"
    new_weights, new_words = folder / f".{name}.safetensors", folder / f".{name}.json"
    save_file({key: tensor.detach().float().contiguous().cpu() for key, tensor in state.items()}, new_weights)
    new_words.write_text(json.dumps(facts, indent=1) + "\n")
    os.replace(new_weights, weights)
    os.replace(new_words, words)
    return weights


def encoder_facts(encoder: Encoder, config: EncoderConfig, **facts: Any) -> dict[str, Any]:
    """What ``encoder.json`` says: architecture and arguments for timm, our own encoder section, and ``facts`` of the run."""
    return {
        "architecture": encoder.architecture,
        "arguments": encoder.arguments,
        "image_size": list(encoder.spec.image_size),
        "encoder": config.model_dump(mode="json"),
        **facts,
    }


def read_export(path: Path, name: str = "encoder") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state, facts) of an export: its folder, a run's folder, or the .safetensors file. Raises CheckpointError."""
    path = Path(path)
    folder = path.parent if path.suffix == ".safetensors" else path / "export" if (path / "export").is_dir() else path
    weights, words = folder / f"{name}.safetensors", folder / f"{name}.json"
    for file in (weights, words):
        if not file.is_file():
            raise CheckpointError(f"{file} does not exist; give a run's folder, its export folder or its {name}.safetensors")
    try:
        facts = json.loads(words.read_text())
        missing = [key for key in NEEDED if key not in facts]
        state = load_file(weights)
    except (ValueError, OSError, SafetensorError) as error:
        raise CheckpointError(f"the export in {folder} is damaged: {str(error).splitlines()[0]}; export it again") from None
    if missing:
        raise CheckpointError(f"{words} lacks {', '.join(missing)}; export it again")
    return state, facts


def newest_export(runs: Path) -> Path:
    """The export folder under ``runs`` whose encoder was written last. Raises CheckpointError where there is none."""
    found = sorted(runs.glob("*/export/encoder.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise CheckpointError(f"no encoder was exported below {runs}; run python -m pretrain first, or give encoder=PATH")
    return found[-1].parent


def load_encoder(path: Path, *, fill: bool = True, **changes: Any) -> tuple[Encoder, dict[str, Any]]:
    """An exported encoder, built anew and filled, and its facts.

    ``changes`` overwrite keys of its encoder section (``image_size``, ``drop_path``); for another image size the positions are
    resampled by the encoder's own rule. Fixed positions become trainable, as MAE's fine-tuning has them, unless
    ``positions="sincos"`` is among the changes. ``fill=False`` builds the same network and leaves it as it was initialised.
    """
    state, facts = read_export(path)
    section = EncoderConfig.model_validate({**facts["encoder"], "positions": "learned", **changes})
    encoder = Encoder.create(section.name, **section.model_dump(exclude={"name"}))
    patch = encoder.spec.patch
    grid = (facts["image_size"][0] // patch[0], facts["image_size"][1] // patch[1])
    if not fill:
        return Encoder.create(
            section.name, **{**section.model_dump(exclude={"name"}), "positions": facts["encoder"]["positions"]}
        ), facts
    encoder.load_state(state, resample=grid != encoder.spec.grid, grid=grid)
    return encoder, facts
