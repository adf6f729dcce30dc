"""Export: weights under timm's names in safetensors, and beside them the JSON that says how to build and feed the model.

``encoder.safetensors`` + ``encoder.json`` is where pretraining ends and fine-tuning begins; a classifier is written the same
way. Two lines of plain timm load either:

    facts = json.load(open("export/encoder.json"))
    model = timm.create_model(facts["architecture"], **facts["arguments"], checkpoint_path="export/encoder.safetensors")
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitssl.card import write_card
from vitssl.config import build
from vitssl.errors import CheckpointError
from vitssl.models.adopt import adopt
from vitssl.models.encoder import Encoder
from vitssl.models.stems import stem_of
from vitssl.sections import EncoderConfig

NEEDED = ("architecture", "arguments", "image_size", "mean", "std", "pooling")  # and an encoder its section "encoder"
_USAGE = """
import json, timm

facts = json.load(open("{name}.json"))
model = timm.create_model(facts["architecture"], **facts["arguments"], checkpoint_path="{name}.safetensors")
"""
_ENCODER = """
import vitssl

encoder, facts = vitssl.load_encoder("{name}.safetensors")
"""
_OURS = """
from pathlib import Path

from vitssl.interop.ours import classifier_of
from vitssl.train.export import read_export

model = classifier_of(*read_export(Path("{name}.safetensors"), "{name}"))
"""


@dataclass(frozen=True)
class Held:
    """An export that is in memory and in no folder, for all that reads one here."""

    name: str
    state: dict[str, Tensor] = field(repr=False)
    facts: dict[str, Any] = field(repr=False)

    def __str__(self) -> str:
        return self.name


def write_export(folder: Path, name: str, state: dict[str, Tensor], facts: dict[str, Any]) -> Path:
    """Write ``name.safetensors`` and ``name.json``, each replaced atomically, and a model card; returns the weights' path.

    The card quotes the recipe and the numbers of the run that ``facts`` name, where its folder is at hand.
    Raises CheckpointError where they cannot be written; an earlier export is then still whole.
    """
    weights, words = folder / f"{name}.safetensors", folder / f"{name}.json"
    new_weights, new_words = folder / f".{name}.safetensors", folder / f".{name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.detach().float().contiguous().cpu() for key, tensor in state.items()}, new_weights)
        new_words.write_text(json.dumps(facts, indent=1) + "\n")
        new_weights.chmod(new_words.stat().st_mode)  # safetensors lets nobody but the owner read
        os.replace(new_weights, weights)
        os.replace(new_words, words)
        own = _ENCODER if name == "encoder" else _OURS  # where head or stem are none that timm's ViT can have
        library, usage = ("vitssl", own) if facts.get("head") or stem_of(facts) else ("timm", _USAGE)
        write_card(folder, facts, library=library, usage=usage.format(name=name), run=Path(facts.get("run", folder)))
    except (OSError, SafetensorError) as error:
        for unfinished in (new_weights, new_words):
            unfinished.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(f"{weights} could not be written: {reason}; free space and run the same command again") from error
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


def read_export(path: Path | Held, name: str = "encoder") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state, facts) of an export: its folder, a run's folder, or the .safetensors file. Raises CheckpointError."""
    if isinstance(path, Held):
        return path.state, path.facts
    facts, weights = read_facts(path, name), _folder(path, name) / f"{name}.safetensors"
    try:
        return load_file(weights), facts
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{weights} is damaged: {str(error).splitlines()[0]}; export it again") from None


def read_facts(path: Path | Held, name: str = "encoder") -> dict[str, Any]:
    """The JSON of an export. Raises CheckpointError where a file is missing, damaged or incomplete."""
    if isinstance(path, Held):
        return path.facts
    words = _folder(path, name) / f"{name}.json"
    try:
        facts = json.loads(words.read_text())
    except ValueError as error:
        raise CheckpointError(f"{words} is damaged: {error}; export it again") from None
    needed = (*NEEDED, "encoder") if name == "encoder" else NEEDED
    if missing := [key for key in needed if not isinstance(facts, dict) or key not in facts]:
        raise CheckpointError(f"{words} lacks {', '.join(missing)}; export it again")
    return facts


def _folder(path: Path, name: str) -> Path:
    path = Path(path)
    folder = path.parent if path.suffix == ".safetensors" else path / "export" if (path / "export").is_dir() else path
    for file in (folder / f"{name}.safetensors", folder / f"{name}.json"):
        if not file.is_file():
            raise CheckpointError(f"{file} does not exist; give a run's folder, its export folder or its {name}.safetensors")
    return folder


def last_part(path: Path) -> tuple[Path, str]:
    """(folder, name) for :func:`read_export` of what a run ended with: a fine-tuned run's last classifier, else the encoder."""
    for folder in (path / "export" / "last", path / "last", path, path.parent):
        if (folder / "classifier.json").is_file() and path.name != "encoder.safetensors":
            return folder, "classifier"
    return path, "encoder"


def exported_classifier(name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(state, facts) of the classifier of ours that ``name`` is the path of, else None. Raises CheckpointError."""
    where = last_part(Path(name))
    return read_export(*where) if Path(name).exists() and where[1] == "classifier" else None


def newest_export(runs: Path) -> Path:
    """The export folder under ``runs`` whose encoder was written last. Raises CheckpointError where there is none."""
    found = sorted(runs.glob("*/export/encoder.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise CheckpointError(f"no encoder was exported below {runs}; run python -m pretrain first, or give encoder=PATH")
    return found[-1].parent


def encoder_like(path: Path | Held, **changes: Any) -> tuple[Encoder, dict[str, Any]]:
    """An encoder built as an export says and initialised afresh, and the export's facts.

    ``changes`` overwrite keys of its encoder section (``image_size``, ``drop_path``). Positions and the patch embedding are
    trainable, also those that were fixed in pretraining, as in MAE's and MoCo v3's fine-tuning; and stochastic depth grows
    linearly.
    """
    facts, forgotten = read_facts(path), {"freeze_patch_embed": False, "drop_path_shape": "linear"}
    section = build(EncoderConfig, {**facts["encoder"], **forgotten, **changes}, where=str(path))
    encoder = Encoder.create(section.name, **section.model_dump(exclude={"name"}))
    if encoder.vit.pos_embed is not None:
        encoder.vit.pos_embed.requires_grad_(True)
        encoder.positions = "learned"
    return encoder, facts


def fill_encoder(encoder: Encoder, path: Path | Held, *, new_register: bool = False) -> None:
    """Put an export's weights into an encoder of the same architecture, strictly; positions are resampled to its grid.

    A final norm that the encoder has dropped is left out. With ``new_register`` the encoder has one more than the export, its
    last, which keeps the token and the position it was made with. Raises CheckpointError with a table of keys.
    """
    if new_register:
        other, _ = load_encoder(path)
        if isinstance(encoder.vit.norm, nn.Identity):
            other.drop_norm()
        adopt(encoder, other)
        return
    state, facts = read_export(path)
    if not any(name.startswith("norm.") for name in encoder.state()):
        state = {name: tensor for name, tensor in state.items() if not name.startswith("norm.")}
    rows, columns = (side // patch for side, patch in zip(facts["image_size"], encoder.spec.patch, strict=True))
    try:
        encoder.load_state(state, resample=(rows, columns) != encoder.spec.grid, grid=(rows, columns))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def load_encoder(path: Path | Held, **changes: Any) -> tuple[Encoder, dict[str, Any]]:
    """An exported encoder, built and filled, and its facts; ``changes`` as in :func:`encoder_like`."""
    encoder, facts = encoder_like(path, **changes)
    fill_encoder(encoder, path)
    return encoder, facts
