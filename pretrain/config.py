"""What pretraining can be told: the shared sections, the encoder, the objectives, and what is watched on the way."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from vitssl.command import Command, help_text, parse
from vitssl.config import Count, Every, Section, Time, load
from vitssl.report import show
from vitssl.schedule import Duration, Schedule
from vitssl.sections import DataConfig, EncoderConfig, Fraction, InitConfig, Positive, ProgramConfig, Share, SourceConfig

DEFAULT = Path(__file__).parent.parent / "configs" / "pretrain" / "demo.yaml"
FLAGS = {
    "--plan": "print every derived number and stop",
    "--bench step": "time one training step beside a plain eager one, and stop",
    "--bench data": "time the data engine beside the usual ones, and stop",
}

ONLINE = ("knn", "fewshot", "ridge", "logistic", "linear_mae", "linear_moco_v3", "spectrum")
"""The protocols that need pooled features alone."""


class TrainingConfig(DataConfig):
    mean: tuple[float, ...] = Field((0.485, 0.456, 0.406), description="per channel, in units of [0, 1]; ImageNet's")
    std: tuple[Positive, ...] = Field((0.229, 0.224, 0.225), description="per channel, in units of [0, 1]; ImageNet's")


def _online(names: list[str]) -> list[str]:
    for name in names:
        if name not in ONLINE:
            raise ValueError(f"{name} is none of {', '.join(ONLINE)}; python -m finetune.evaluate has others for afterwards")
    return names


class StartConfig(InitConfig):
    weights: str | None = Field(
        None, description="to begin with: an export (folder, run, .safetensors), an official file, timm:TAG or hf:FOLDER"
    )
    head_warmup: Time | None = Field(
        None, description="of the run, in which the encoder keeps init.weights; null: 5% with them, else none"
    )

    @field_validator("head_warmup")
    @classmethod
    def _keeps_weights(cls, value: Duration | None, info: ValidationInfo) -> Duration | None:
        if value is not None and value.value and info.data.get("weights") is None:
            raise ValueError("is for weights that were given, and init.weights names none; leave it out, or name some")
        return value


class HeldoutConfig(SourceConfig):
    every: Every = Field(Duration(10, "%"), description="between two measurements of the loss, masks fixed")
    samples: Count = Field(512, description="images measured")
    pictures: int = Field(8, ge=0, description="of them, reconstructed for the eye each time")


class ProbeConfig(Section):
    """Frozen features, judged on the way. ``bank``: labelled images to learn from (no path: no probe); ``queries``: judged."""

    bank: SourceConfig = SourceConfig()
    queries: SourceConfig = SourceConfig()
    bank_samples: Count = Field(10_000, description="of the bank, at most")
    queries_samples: Count = Field(2_000, description="of the queries, at most")
    crop_pct: Share = Field(1.0, description="central part that is looked at (0.875: resize 256, crop 224)")
    every: Every = Field(Duration(20, "%"), description="between two probes")
    protocols: Annotated[list[str], AfterValidator(_online)] = Field(
        ["knn", "fewshot", "ridge", "spectrum"], description=f"some of {', '.join(ONLINE)}, as finetune.evaluate has them"
    )
    seeds: Count = Field(3, description="of what is drawn: few shots, the order of batches, first weights")


class TeacherConfig(Section):
    """The run's one teacher, an average of the encoder that methods of self-distillation and MoCo v3 look at."""

    momentum: Fraction | None = Field(None, description="of the average at the beginning; null: as the method's paper has it")
    final: Fraction = Field(1.0, description="momentum at the end of the run")
    shape: Literal["cosine", "linear", "constant"] = Field("cosine", description="of the way between the two")

    @field_validator("final", "shape")
    @classmethod
    def _is_of_a_momentum(cls, value: Any, info: ValidationInfo) -> Any:
        if value != cls.model_fields[info.field_name].default and info.data.get("momentum", 1.0) is None:
            raise ValueError("is of a momentum that is not given; set teacher.momentum too, or leave it out")
        return value

    @property
    def schedule(self) -> Schedule | None:
        return None if self.momentum is None else Schedule(self.momentum, final=self.final, shape=self.shape)


def _off(value: Any) -> Any:
    return "off" if value is False else value  # what YAML makes of the word


class HealthConfig(Section):
    """Whether features collapse or training becomes unstable, on a few training images under random crops."""

    every: Every = Field(Duration(200, "steps"), description="between two measurements; an alarm needs two that look ill")
    images: int = Field(64, ge=2, description="measured")
    views: int = Field(2, ge=2, description="random crops of each, for LiDAR")
    on_alarm: Annotated[Literal["off", "warn", "stop", "rollback"], BeforeValidator(_off)] = Field(
        "warn", description="off: nothing is measured; rollback: to the newest checkpoint before the signs, with later images"
    )


class PretrainConfig(ProgramConfig):
    """Everything ``python -m pretrain`` can be told."""

    data: TrainingConfig = Field(TrainingConfig(), description="what is trained on")
    encoder: EncoderConfig = EncoderConfig()
    objectives: dict[str, dict[str, Any]] = Field({"mae": {}}, description="methods by name, each with its own settings")
    teacher: TeacherConfig = TeacherConfig()
    pooling: Literal["mean", "class"] = Field("mean", description="of the tokens, for probes and in encoder.json")
    health: HealthConfig = HealthConfig()
    heldout: HeldoutConfig = HeldoutConfig()
    probe: ProbeConfig = ProbeConfig()
    init: StartConfig = StartConfig()

    @property
    def head_warmup(self) -> Duration | None:
        """How long the encoder waits while fresh heads on given weights warm up alone; one that is fresh as well never does."""
        if self.init.head_warmup is not None:
            return self.init.head_warmup
        return None if self.init.weights is None else Duration(5, "%")


def read(argv: Sequence[str]) -> tuple[PretrainConfig | None, Command]:
    """The config of a command line, or None where help was all that was asked for. Raises ConfigError."""
    command = parse(argv, flags={"--plan": (), "--bench": ("step", "data")})
    if "--help" in command.flags:
        show(help_text("pretrain", "Pretrain a ViT encoder on images without labels.", PretrainConfig, FLAGS))
        return None, command
    return load(PretrainConfig, command.config or DEFAULT, command.overrides), command
