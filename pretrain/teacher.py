"""The frozen teacher of a run that distils: found by its name and loaded, an encoder for tokens or a classifier for labels."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from pretrain.config import PretrainConfig
from pretrain.start import Start
from vitssl import objectives
from vitssl.errors import ConfigError
from vitssl.interop.taught import named_classifier
from vitssl.models.encoder import Encoder
from vitssl.models.spec import EncoderSpec
from vitssl.models.teacher import Teacher
from vitssl.report import Report
from vitssl.train.export import exported_classifier
from vitssl.train.taught import note_teacher, refuse_other_teacher


class Taught:
    """The teacher of a config's one objective that has one, and what is said and written of it."""

    def __init__(self, method: str, settings: dict) -> None:
        self.key = f"objectives.{method}.teacher"
        self.config = objectives.configure(method, settings)
        asked = self.config.teacher
        self.name = asked.name
        with torch.device("cpu"):  # also where all else is an outline
            network, facts = self._classifier() if self.config.target == "labels" else self._encoder()
        facts.pop("classes", None)
        if asked.image_size is not None:
            size = asked.image_size
            facts["size"] = (size, size) if isinstance(size, int) else size
            if isinstance(network, Encoder):
                network.spec.refuse_size(facts["size"], f"{self.key}.image_size:")
        self.teacher = Teacher(network, **facts)

    @classmethod
    def open(cls, config: PretrainConfig) -> "Taught | None":
        """None where nobody teaches. Raises ConfigError and CheckpointError, each in one line."""
        found = [(name, settings) for name, settings in config.objectives.items() if objectives.find(name).taught]
        return cls(*found[0]) if found else None

    def tell(self, spec: EncoderSpec, report: Report) -> None:
        """Say who teaches what."""
        what = {"tokens": "class and patch tokens", "class": "the class token", "patches": "patch tokens", "labels": "labels"}
        report.say(
            f"teacher {self.name}: {what[self.config.target]}; it sees {self.teacher.sees(spec.image_size)}"
            f" ({self.key}.image_size)"
        )

    def refuse_another(self, folder: Path) -> None:
        """Raise ConfigError where the run in ``folder`` was begun with other weights under the same name."""
        refuse_other_teacher(folder, self.key, self.name, self.teacher)

    def note(self, folder: Path) -> None:
        """Write down whose answers this run learns from."""
        note_teacher(folder, self.name, self.teacher)

    def _classifier(self) -> tuple[nn.Module, dict[str, Any]]:
        asked = self.config.teacher
        return named_classifier(self.key, asked.name, asked.weights, exported_classifier(asked.name))

    def _encoder(self) -> tuple[nn.Module, dict[str, Any]]:
        if (weights := self.config.teacher.weights) is not None:
            raise ConfigError(
                f"{self.key}.weights={weights}: is for target=labels; an encoder's name says of its weights, as timm:TAG"
            )
        found = Start.named(f"{self.key}.name", self.name)
        size = found.encoder.spec.image_size
        return found.encoder, {"mean": found.facts["mean"], "std": found.facts["std"], "size": size}
