"""Weights to begin with, from wherever they come, and whether the encoder that the config describes can take them.

The config alone says which encoder is trained: where the weights are of another network nothing is guessed, and the message
holds the section that fits, ready to be copied.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pretrain.config import PretrainConfig
from vitssl.config import build
from vitssl.errors import UserError
from vitssl.interop.source import is_foreign, named_weights
from vitssl.models.adopt import adopt, require_like
from vitssl.models.encoder import Encoder
from vitssl.sections import EncoderConfig
from vitssl.train import checkpoint
from vitssl.train.export import load_encoder
from vitssl.train.folder import run_folder


@dataclass(frozen=True)
class Start:
    """What ``init.weights`` names: an encoder, its section and facts, and how many tensors of its file are no part of it."""

    name: str
    encoder: Encoder
    section: EncoderConfig
    facts: dict[str, Any]
    beside: int

    @classmethod
    def open(cls, config: PretrainConfig) -> "Start | None":
        """None where the run begins from nothing, or was begun. Raises CheckpointError and ConfigError, in one line."""
        name, begun = config.init.weights, checkpoint.found(run_folder(config) / "checkpoints")
        if name is None or begun or config.init.resume is not None:
            return None
        return cls.named("init.weights", name)

    @classmethod
    def named(cls, key: str, name: str) -> "Start":
        """The encoder that a ``key`` of the config names. Raises CheckpointError and ConfigError, in one line."""
        if is_foreign(name):
            found = named_weights(key, name)
            return cls(name, found.encoder, found.section, found.facts, dict(found.coverage).get("beside it", 0))
        try:
            encoder, facts = load_encoder(Path(name))
        except UserError as error:
            raise type(error)(f"{key}={name}: {error}") from error
        return cls(name, encoder, build(EncoderConfig, facts["encoder"], where=name), facts, 0)

    def require_fit(self, encoder: Encoder, config: EncoderConfig) -> None:
        """Raise CheckpointError where ``encoder`` (it may be an outline) cannot take these weights."""
        try:
            require_like(encoder, self.encoder, advice=f"write  encoder: {self._section(config)}")
        except UserError as error:
            raise type(error)(f"init.weights={self.name}: {error}") from None

    def fill(self, encoder: Encoder, config: PretrainConfig) -> list[str]:
        """Give ``encoder`` the weights; returns what is to be said of it. Raises CheckpointError."""
        try:
            notes = adopt(encoder, self.encoder)
        except UserError as error:
            raise type(error)(f"init.weights={self.name}: {error}") from None
        notes += [f"{self.beside:,} tensors beside it (heads, a decoder) not taken"] if self.beside else []
        said = [f"encoder from {self.name}: {', '.join(notes) or 'every tensor as it is'}"]
        for key in ("mean", "std"):
            then, now = self.facts[key], list(getattr(config.data, key))
            if then != now and len(then) == len(now):
                said.append(f"warning: these weights were trained with data.{key}={then}, and this run has {now}")
        return said

    def _section(self, config: EncoderConfig) -> str:
        """The encoder section that these weights fit, for this run's images, on one line of YAML."""
        ours, theirs = (each.model_dump(mode="json") for each in (config, self.section))
        network = {key: theirs[key] for key in ("name", "registers", "class_token", "arguments")}
        values = ours | network | {"patch_size": ours["patch_size"] or theirs["patch_size"]}
        plain = EncoderConfig().model_dump(mode="json")
        values = {key: value for key, value in values.items() if key in ("name", "image_size") or value != plain[key]}
        return yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=10_000).strip()
