"""Classifiers that teach, by the names that a config gives them: one of ours, a timm model's folder, or a timm model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitssl.errors import ConfigError
from vitssl.interop.files import read_tensors
from vitssl.interop.ours import classifier_of
from vitssl.models.teacher import timm_network

Export = tuple[Mapping[str, Tensor], Mapping[str, Any]]


def named_classifier(key: str, name: str, weights: Path | None, export: Export | None) -> tuple[nn.Module, dict[str, Any]]:
    """(network, what a ``Teacher`` is told of it, and the names of its ``classes`` where it is ours).

    ``key``: the section of the config that has ``name`` and ``weights``. ``export``: (state, facts) where the name is of one
    of ours. Raises ConfigError and CheckpointError, each in one line.
    """
    if export is None:
        return _timm(key, name, weights)
    if weights is not None:
        raise _two_weights(key, name, weights)
    state, facts = export
    if facts.get("labels") == "several":
        raise ConfigError(f"{key}.name={name}: tells several labels of an image, and distillation is of one; take another")
    known = {"mean": facts["mean"], "std": facts["std"], "size": tuple(facts["image_size"])}
    return classifier_of(state, facts), known | {"classes": (names := tuple(facts["classes"])), "num_classes": len(names)}


def _timm(key: str, name: str, weights: Path | None) -> tuple[nn.Module, dict[str, Any]]:
    tag = name
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ConfigError(f"{key}.name={name}: holds neither a classifier of ours nor a timm model's config.json")
        tag = f"local-dir:{name}"
    if tag.startswith("local-dir:") and weights is not None:
        raise _two_weights(key, tag, weights)
    network, known = timm_network(tag, None if weights is None else read_tensors(weights), key=key)
    size = tuple(known["input_size"][-2:])
    return network, {"mean": known["mean"], "std": known["std"], "size": size, "num_classes": network.num_classes}


def _two_weights(key: str, name: str, weights: Path) -> ConfigError:
    return ConfigError(f"{key}.weights={weights}: {name} has weights of its own; leave them out")
