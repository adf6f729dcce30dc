"""timm's own weights come in, by tag or from a local folder, and ours go out as a folder that timm loads by one line.

Surprising: a timm model that normalises after pooling has no final norm of its own; its norm after pooling takes that place.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vitssl.card import write_card
from vitssl.config import build
from vitssl.errors import CheckpointError
from vitssl.interop.deit import is_distilled, under_deit
from vitssl.interop.folder import new_folder
from vitssl.interop.official import Imported, statistics_for
from vitssl.interop.ours import classifier_of, create, encoder_of, require_plain, resized, rule_of, tokens_of
from vitssl.interop.parity import exactly, require_parity, trial_images
from vitssl.models.adapters.build import adapter_of, section_of_arguments
from vitssl.models.state import require_fit
from vitssl.sections import EncoderConfig

BESIDE = ("head.", "fc_norm.", "attn_pool.")  # parts of timm's models that are no part of an encoder


def import_timm(source: str) -> Imported:
    """The encoder of a pretrained timm model: ``vit_small_patch16_224.augreg_in21k``, or a folder with its config.json.

    A tag is downloaded by timm, once. Raises CheckpointError: timm cannot load it, it has no weights, or is no ViT served here.
    """
    local = Path(source.removeprefix("local-dir:"))
    name = f"local-dir:{local}" if local.is_dir() else source
    saved = _saved(local)
    adapter = adapter_of(saved.get("architecture", source))
    model = _pretrained(name, **adapter.fixed)
    if type(model) is not adapter.model:
        raise CheckpointError(
            f"timm:{source} is a {type(model).__name__}; only timm's plain VisionTransformer, Eva and Beit are read"
        )
    known = model.pretrained_cfg
    rule = {"pos_resample": saved.get("vitssl", {}).get("pos_resample", "timm")}  # what our export noted there
    section = build(EncoderConfig, _section(model, known, saved.get("model_args", {})) | rule, where=f"timm:{source}")
    encoder = create(section)
    state = dict(model.state_dict())
    beside = {key for key in state if key.startswith(BESIDE)}
    taken = {key: tensor for key, tensor in state.items() if key not in beside}
    moved = {key.replace("fc_norm.", "norm."): state[key] for key in beside if key.startswith("fc_norm.")}
    after_pooling = bool(moved) and isinstance(model.norm, nn.Identity)
    encoder.load_state(taken | moved if after_pooling else taken)
    facts = {
        "mean": statistics_for(known["mean"], section.channels),
        "std": statistics_for(known["std"], section.channels),
        "pooling": "mean" if model.global_pool.startswith("avg") or model.cls_token is None else "class",
        "run": f"timm:{source}",
        "format": "timm",
    }
    images = trial_images({**facts, "image_size": encoder.spec.image_size})
    with exactly(model, encoder):
        tokens = encoder(images, last_blocks=1)
        last = tokens.blocks[0] if after_pooling else tokens
        found = torch.cat([last.prefix, last.patches], dim=1)
        facts["parity"] = require_parity(found, model.forward_features(images), what=f"timm:{source}")
    coverage = [("encoder", len(taken))]
    coverage += [("norm after pooling, now the final norm", len(moved))] if after_pooling else []
    return Imported(encoder, section, facts, [*coverage, ("beside it", len(beside) - (len(moved) if after_pooling else 0))])


def export_timm(
    folder: Path,
    state: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    *,
    run: Path | None = None,
    images: Tensor | None = None,
) -> float:
    """Write ``config.json``, ``model.safetensors`` and ``README.md``; timm reads them and must compute what we do.

    An encoder pools as its export says. ``images``: real ones [N, C, H, W] to compare on too, normalised. Returns the
    difference reached; a distilled classifier becomes timm's DeiT. Raises CheckpointError; ``folder`` is then not there.
    """
    require_plain(facts, "timm", head=not is_distilled(facts))
    classifier = "classes" in facts
    pooling = {} if classifier else {"global_pool": {"mean": "avg", "class": "token"}[facts["pooling"]]}
    facts = {**facts, "arguments": facts["arguments"] | pooling}
    images = trial_images(facts, images)
    ours = classifier_of(state, facts) if classifier else encoder_of(state, facts)
    if is_distilled(facts):
        state, facts = under_deit(state, facts, ours.encoder)
    with new_folder(folder) as unfinished:
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, unfinished / "model.safetensors")
        (unfinished / "config.json").write_text(json.dumps(_hub_config(facts), indent=2) + "\n")
        theirs = _pretrained(f"local-dir:{unfinished}")
        require_fit(theirs.state_dict(), state, model=str(folder))
        with exactly(ours, theirs):
            if classifier:
                reached = require_parity(theirs(images), ours(images), what=str(folder))
            else:
                pooled = ours(images).pool(facts["pooling"])
                reached = max(
                    require_parity(theirs.forward_features(images), tokens_of(ours, images), what=str(folder)),
                    require_parity(theirs(images), pooled, what=str(folder)),
                )
        usage = f'import timm\n\nmodel = timm.create_model("local-dir:{folder.name}", pretrained=True)'
        rule = rule_of(facts)
        notes = f"At other image sizes timm carries positions over by its own rule, not by that of {rule}."
        notes = "" if rule == "timm" else notes
        write_card(unfinished, facts, library="timm", usage=usage, differs=reached, run=run, notes=notes)
    return reached


def _pretrained(name: str, **arguments: Any) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=True, **arguments)
    except Exception as error:  # timm's, the hub client's and the network's own kinds
        advice = "give a tag of timm.list_pretrained('vit*') or a folder that holds config.json and model.safetensors"
        raise CheckpointError(f"timm {timm.__version__} cannot load {name}: {_line(error)}; {advice}") from error


def _saved(folder: Path) -> dict[str, Any]:
    """A folder's config.json, which says what its model was built with. Raises CheckpointError where it cannot be read."""
    config = folder / "config.json"
    try:
        return json.loads(config.read_text()) if config.is_file() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config} cannot be read: {error}; give a folder that timm's save_for_hf wrote") from None


def _section(model: nn.Module, known: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    stem = model.patch_embed
    own = {"image_size": list(stem.img_size)}
    if isinstance(stem, timm.layers.PatchEmbed):
        own |= {"patch_size": list(stem.patch_size), "channels": stem.proj.in_channels}
    else:  # a hybrid's, whose patches are of features
        own |= {"channels": stem.in_chans}
    class_token = model.cls_token is not None
    prefix = {"registers": model.num_prefix_tokens - class_token, "class_token": class_token}
    further = section_of_arguments(known["architecture"], arguments)["arguments"]
    return {"name": known["architecture"], **own, **prefix, "arguments": further}


def _hub_config(facts: Mapping[str, Any]) -> dict[str, Any]:
    """timm's config.json. Sizes are those the weights were made for, ``test_input_size`` is that a classifier was judged at;
    labels are in the order of the logits."""
    arguments, num = facts["arguments"], facts["arguments"].get("num_classes", 0)
    size = [len(facts["mean"]), *facts["image_size"]]
    known = {
        "input_size": size,
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": _crop_pct(facts["image_size"], facts),
        "mean": facts["mean"],
        "std": facts["std"],
        "num_classes": num,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    if (tested := facts.get("tested_size", facts["image_size"])) != facts["image_size"]:
        known |= {"test_input_size": [size[0], *tested], "test_crop_pct": _crop_pct(tested, facts)}
    labels = {"label_names": list(facts["classes"])} if "classes" in facts else {}
    head = {"architecture": facts["architecture"], "num_classes": num, "global_pool": arguments["global_pool"]}
    noted = {"vitssl": {"pos_resample": rule_of(facts)}}  # for ourselves: timm knows no rule but its own
    return head | labels | {"model_args": dict(arguments), "pretrained_cfg": known} | noted


def _crop_pct(size: Sequence[int], facts: Mapping[str, Any]) -> float:
    """The number of which timm, which rounds down, makes the size that we resize to and crop from."""
    given, resize = facts.get("crop_pct", 1.0), resized(size, facts)
    return given if math.floor(min(size) / given) == resize else min(size) / (resize + 0.5)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__} {error}".split())[:300]
