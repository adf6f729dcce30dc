"""Hugging Face transformers' ViT, ViTMAE, DINOv2, DINOv3, I-JEPA, BEiT, data2vec: from a local folder and into one.

Surprising: transformers' ViTs normalise with an epsilon of 1e-12 unless their configuration says otherwise, timm's with 1e-6.
What goes out carries its epsilon in config.json. What comes in is compared at timm's, and the distance to its own is told.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitssl.card import write_card
from vitssl.config import build
from vitssl.errors import CheckpointError
from vitssl.interop.families import BESIDE, FAMILIES, Family
from vitssl.interop.folder import new_folder
from vitssl.interop.mae import Painter
from vitssl.interop.names import foreign, own, split_positions
from vitssl.interop.official import Imported, statistics_for
from vitssl.interop.ours import classifier_of, create, encoder_of, require_plain, rule_of, tokens_of
from vitssl.interop.parity import difference, exactly, require_parity, trial_images
from vitssl.interop.settings import epsilon_of, family_of, processor_of, settings_of, with_scale
from vitssl.models.state import require_fit
from vitssl.sections import EncoderConfig

try:
    import transformers
except ImportError as error:
    raise CheckpointError(f"{error.name} is not installed: pip install 'vitssl[transformers]'") from None

FARTHEST = 1e-2  # of the outputs' size: how far timm's epsilon may lead from the file's own
ACTIVATIONS = {"gelu": {}, "gelu_new": {"act_layer": "gelu_tanh"}, "gelu_pytorch_tanh": {"act_layer": "gelu_tanh"}}
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()  # what does not fit is told here, and what is declared is no cause for a table


def import_transformers(folder: Path) -> Imported:
    """The encoder of a folder with config.json and model.safetensors, as ``save_pretrained`` writes it.

    Raises CheckpointError: another kind of model, weights missing or left over, or one that timm cannot compute.
    """
    config = _read_json(folder / "config.json")
    kind = FAMILIES.get(config.get("model_type", ""))
    if kind is None:
        known = ", ".join(FAMILIES)
        raise CheckpointError(f"{folder} holds a model of type {config.get('model_type')!r}; those that are read: {known}")
    model, beside = _load(kind.model, folder, **kind.load_options(config.get("architectures") or []))
    settings = model.config
    theirs = {key.replace("pooler.layernorm.", "layernorm."): value for key, value in model.state_dict().items()}
    state = own({key: value for key, value in theirs.items() if not key.startswith(BESIDE)}, kind.layout)
    beside += [key for key in theirs if key.startswith(BESIDE) and key not in beside]
    gammas = [name for name in state if name.endswith(".gamma")]
    if all(torch.equal(state[name], torch.ones_like(state[name])) for name in gammas):
        state = {name: tensor for name, tensor in state.items() if name not in gammas}  # a scale of 1 is none
    state = kind.convert(state)
    sides = zip(_pair(settings.image_size), _pair(settings.patch_size), strict=True)
    values = kind.section_of(state, heads=settings.num_attention_heads, grid=tuple(side // patch for side, patch in sides))
    said = {"pooling": kind.pooling, "pos_resample": kind.resample} | config.get("vitssl", {})  # what our export noted there
    values["pos_resample"] = said["pos_resample"]
    if not (getattr(settings, "use_swiglu_ffn", False) or getattr(settings, "use_gated_mlp", False)):
        values["arguments"] |= _activation(settings.hidden_act, folder)
    values["arguments"] |= kind.arguments(settings)
    section = build(EncoderConfig, values, where=str(folder))
    encoder = create(section)
    encoder.load_state(state)
    facts = {
        **_statistics(folder, kind, section.channels),
        "pooling": said["pooling"],
        "run": str(folder),
        "format": "transformers",
    }
    images = trial_images({**facts, "image_size": encoder.spec.image_size})
    with exactly(model, encoder):
        expected, found = _tokens(model, images), tokens_of(encoder, images)
        far = difference(found, expected)
        _set_epsilon(model, epsilon_of(encoder))
        facts["parity"] = require_parity(found, _tokens(model, images), what=str(folder), tolerance=kind.tolerance)
    if settings.layer_norm_eps != epsilon_of(encoder):
        facts["norm_epsilon"] = f"{epsilon_of(encoder):g} instead of {settings.layer_norm_eps:g}: outputs differ by {far:.1e}"
        if far > FARTHEST:
            raise CheckpointError(f"{folder}: its norms need an epsilon that timm's do not have ({facts['norm_epsilon']})")
    num = sum(not key.startswith(BESIDE) for key in theirs)
    return Imported(encoder, section, facts, [("encoder", num), ("beside it", len(beside))])


def export_transformers(
    folder: Path,
    state: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    *,
    run: Path | None = None,
    images: Tensor | None = None,
    painter: Painter | None = None,
) -> float:
    """Write what ``from_pretrained(folder)`` reads: ViTModel, Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel, IJepaModel
    or BeitModel by what the encoder has, ViTForImageClassification, or with a ``painter``, the decoder of an MAE,
    ViTMAEForPreTraining.

    Returns the difference reached. Raises CheckpointError where transformers has no such network; ``folder`` is then not there.
    """
    require_plain(facts, "transformers")
    classifier = "classes" in facts
    ours = classifier_of(state, facts) if classifier else encoder_of(state, facts)
    if classifier and (facts["pooling"] != "class" or "fc_norm.weight" in state):
        raise CheckpointError(
            "transformers' ViTForImageClassification reads the class token after the final norm, and this classifier the mean"
            " over patches; export it --to timm or --to onnx"
        )
    body = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    if (ours.encoder if classifier else ours).spec.overlaps:
        raise CheckpointError(
            "this encoder has a convolutional network before its blocks, and transformers' ViTs here have none; export it --to"
            " timm or --to onnx"
        )
    family = family_of(body, classifier)
    if painter:
        painter.refuse(family)
    decoder = painter.network(ours.spec) if painter else nn.Identity()
    kind = FAMILIES[family]
    name = "ViTForImageClassification" if classifier else "ViTMAEForPreTraining" if painter else kind.model
    options = kind.options if name == kind.model else {}
    theirs = _build(name, settings_of(family, body, facts, ours) | (painter.settings() if painter else {}), options)
    converted = _converted(body, family, facts)
    if name != kind.model:
        converted = {f"vit.{key}": tensor for key, tensor in converted.items()}
    if classifier:
        converted |= {"classifier.weight": state["head.weight"], "classifier.bias": state["head.bias"]}
    converted |= painter.foreign(decoder) if painter else {}
    require_fit(converted, theirs.state_dict(), model=f"transformers' {name}")
    theirs.load_state_dict(converted)
    images = trial_images(facts, images)
    with new_folder(folder) as unfinished:
        theirs.save_pretrained(unfinished)
        _note(unfinished, facts)
        read, _ = _load(name, unfinished, **options)
        with exactly(ours, decoder, read):
            if painter:
                noise = torch.rand(len(images), ours.spec.num_patches, dtype=images.dtype)
                found, expected = read(images, noise=noise).logits, painter.paint(ours, decoder, images, noise)
            elif classifier:
                found, expected = read(images).logits, ours(images)
            else:
                found, expected = _tokens(read, images), tokens_of(ours, images)
            reached = require_parity(found, expected, what=str(folder), tolerance=kind.tolerance)
        usage = f'import transformers\n\nmodel = transformers.{name}.from_pretrained("{folder.name}")'
        notes = "Pooling is left to the reader: last_hidden_state holds all tokens after the final norm."
        notes = notes if name == kind.model else ""
        write_card(unfinished, facts, library="transformers", usage=usage, differs=reached, run=run, notes=notes)
    return reached


def _converted(state: Mapping[str, Tensor], family: str, facts: Mapping[str, Any]) -> dict[str, Tensor]:
    """An encoder's state under the names of its family."""
    width, _, *patch = state["patch_embed.proj.weight"].shape
    num = math.prod(side // pixels for side, pixels in zip(facts["image_size"], patch, strict=True))
    found = foreign(split_positions(with_scale(state, family), num_patches=num), FAMILIES[family].layout)
    shape = {"dinov2": (1, width), "dinov2_with_registers": (1, width), "dinov3_vit": (1, 1, width)}.get(family)
    found |= {"embeddings.mask_token": torch.zeros(shape)} if shape else {}
    return {"embeddings.register_tokens": torch.zeros(1, 0, width)} | found if family == "dinov3_vit" else found


def _note(folder: Path, facts: Mapping[str, Any]) -> None:
    """Beside what transformers wrote: our pooling and rule for positions, and how images are to be prepared."""
    config = folder / "config.json"
    said = {"pooling": facts["pooling"], "pos_resample": rule_of(facts)}
    config.write_text(json.dumps(_read_json(config) | {"vitssl": said}, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(processor_of(facts), indent=2) + "\n")


def _build(name: str, values: Mapping[str, Any], options: Mapping[str, Any]) -> nn.Module:
    kind = getattr(transformers, name)
    try:
        return kind(kind.config_class(**values), **options).eval()
    except Exception as error:  # its configuration's own kinds, and the network's
        raise CheckpointError(f"transformers {transformers.__version__} cannot build a {name}: {_line(error)}") from error


def _load(name: str, folder: Path, **options: Any) -> tuple[nn.Module, list[str]]:
    """(model, names left over that are declared). Only safetensors of this folder are read; no code of it is run."""
    kind = getattr(transformers, name)
    local = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    try:
        model, said = kind.from_pretrained(folder, **local, **options)
    except Exception as error:  # its own kinds, safetensors' and the network's
        raise CheckpointError(f"transformers {transformers.__version__} cannot load {folder}: {_line(error)}") from error
    missing = sorted(key for key in said["missing_keys"] if not key.endswith("mask_token"))
    own = f"{model.base_model_prefix}."  # below which a larger model's file has the encoder
    left = sorted(key for key in said["unexpected_keys"] if not key.removeprefix(own).startswith(BESIDE))
    other = sorted(str(each[0]) for each in said["mismatched_keys"])
    found = {"missing": missing, "unexpected": left, "of other shape": other}
    if any(found.values()):
        table = "; ".join(f"{len(keys)} {title} ({', '.join(keys[:4])})" for title, keys in found.items() if keys)
        raise CheckpointError(f"{folder}: its weights do not fit transformers' {name}: {table}")
    return model.eval(), sorted(said["unexpected_keys"])


def _tokens(model: nn.Module, images: Tensor) -> Tensor:
    """[B, R + N, D] after the final norm. ViTMAE is told to drop nothing and to keep the order."""
    if model.config.model_type != "vit_mae":
        found = model(images).last_hidden_state
        norm = getattr(getattr(model, "pooler", None), "layernorm", None)  # a BEiT's that normalises after pooling
        return found if norm is None else norm(found)
    model.config.mask_ratio = 0.0
    num = model.embeddings.position_embeddings.shape[1] - 1
    return model(images, noise=torch.arange(num, dtype=images.dtype).expand(len(images), -1)).last_hidden_state


def _activation(name: str, folder: Path) -> dict[str, str]:
    if name not in ACTIVATIONS:
        raise CheckpointError(f"{folder}: its activation is {name}; those that are read: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _statistics(folder: Path, kind: Family, channels: int) -> dict[str, list[float]]:
    """Mean and deviation as the folder's image processor says, else as the family's does."""
    path = folder / "preprocessor_config.json"
    said = _read_json(path) if path.is_file() else {}
    found = {"mean": said.get("image_mean", kind.mean), "std": said.get("image_std", kind.std)}
    return {key: statistics_for(values, channels) for key, values in found.items()}


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _set_epsilon(model: nn.Module, epsilon: float) -> None:
    for part in model.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = epsilon


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"is damaged, {error}"
        raise CheckpointError(f"{path}: {reason}; give a folder that save_pretrained wrote") from None


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__} {error}".split())[:300]
