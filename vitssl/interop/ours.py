"""The networks that our exports hold, built from their files alone: what every other network is compared with."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitssl.config import build
from vitssl.errors import CheckpointError
from vitssl.models.adapters.build import has_norm_after_pooling, section_of_arguments
from vitssl.models.encoder import Encoder
from vitssl.models.heads import ClassificationHead, head_like
from vitssl.models.state import require_fit
from vitssl.models.stems import stem_of
from vitssl.sections import EncoderConfig


class Classifier(nn.Module):
    """An encoder and the head on it: images [B, C, H, W] -> logits [B, classes]."""

    def __init__(self, encoder: Encoder, head: ClassificationHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))


def encoder_of(state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Encoder:
    """The encoder of an export that has been read. Raises CheckpointError where state and facts do not fit."""
    encoder = create(build(EncoderConfig, facts["encoder"], where="encoder.json"))
    encoder.load_state(state)
    return encoder.eval()


def classifier_of(state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Classifier:
    """The classifier of an export that has been read. Raises CheckpointError where state and facts do not fit."""
    arguments = facts["arguments"]
    if (named := len(facts["classes"])) != arguments["num_classes"]:
        raise CheckpointError(
            f"this classifier names {named:,} classes and its head has {arguments['num_classes']:,}; export it again"
        )
    said = {"image_size": facts["image_size"], "pos_resample": rule_of(facts), "stem": stem_of(facts)}
    values = section_of_arguments(facts["architecture"], arguments) | said
    encoder = create(build(EncoderConfig, values, where="classifier.json"))
    norm = encoder.drop_norm() if has_norm_after_pooling(facts["architecture"], arguments) else False
    settings = {"pooling": facts["pooling"], "norm": norm}
    head = head_like(facts.get("head", {}), encoder.spec.dim, arguments["num_classes"], **settings)
    require_fit(state, encoder.state() | head.state(), model=facts["architecture"])
    head.load_state_dict({name: state[name] for name in head.state()})
    encoder.load_state({name: state[name] for name in encoder.state()})
    return Classifier(encoder, head).eval()


def require_plain(facts: Mapping[str, Any], library: str, *, head: bool = True) -> None:
    """Raise CheckpointError for a head or a stem that the other library's ViT has no place for."""
    if stem_of(facts):
        raise CheckpointError(f"this encoder has a Tokens-to-Token stem, and {library} has no place for it; export --to onnx")
    if head and (said := facts.get("head")):
        kind = "two heads and a distillation token" if said.get("distilled") else f"a hidden layer of {said['hidden']}"
        raise CheckpointError(f"this classifier has {kind}, and {library}'s ViT has no place for that; export --to onnx")


def create(section: EncoderConfig) -> Encoder:
    """A new encoder as a section says."""
    return Encoder.create(section.name, **section.model_dump(exclude={"name"}))


def rule_of(facts: Mapping[str, Any]) -> str:
    """Whose interpolation carries an export's positions to other image sizes; timm's where nothing is said."""
    return facts.get("pos_resample") or facts.get("encoder", {}).get("pos_resample", "timm")


def resized(size: Sequence[int], facts: Mapping[str, Any]) -> int:
    """Pixels of the shorter side to which a classifier's evaluation resizes images before it crops ``size`` from the middle."""
    return round(min(size) / facts.get("crop_pct", 1.0))


def tokens_of(encoder: Encoder, images: Tensor) -> Tensor:
    """[B, R + N, D]: everything an encoder says of images, in timm's order."""
    tokens = encoder(images)
    return torch.cat([tokens.prefix, tokens.patches], dim=1)
