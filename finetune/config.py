"""What fine-tuning can be told: the shared sections, the encoder it starts from, the head, augmentation and evaluation."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt

from vitssl.command import Command, help_text, parse
from vitssl.config import Count, Every, Section, load
from vitssl.report import show
from vitssl.schedule import Duration
from vitssl.sections import Area, Beta, Decay, Fraction, OptimConfig, ProgramConfig, Share, Size, SourceConfig

DEFAULT = Path(__file__).parent.parent / "configs" / "finetune" / "demo.yaml"
FLAGS = {"--plan": "print every derived number and stop"}


def _labelled(value: Any) -> int | str | None:
    percent = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", value) if isinstance(value, str) else None
    if percent and 0 < float(percent[1]) <= 100:
        return f"{percent[1]}%"
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError("is no number of images; write 1000, or a share of each class as 1%")
    return value


def _power(value: Any) -> Any:
    return float(value) if isinstance(value, bool) else value


def _names(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {str(old): new if new is None else str(new) for old, new in value.items()}  # numbers are names, too


class HeadConfig(Section):
    pooling: Literal["mean", "class"] | None = Field(None, description="of the tokens; null: what the export says")
    init: Literal["zero", "trunc_normal"] = Field("zero", description="zero: the first loss is ln C (ViT); trunc_normal: MAE's")
    std: float = Field(2e-5, gt=0, description="of trunc_normal")
    hidden: Count | None = Field(None, description="width of a layer with tanh before the last (ViT from scratch); null: none")


class TeacherConfig(Section):
    """A classifier that is distilled (Touvron et al. 2021)."""

    name: str = Field(description="a timm model, a folder with its config.json, or a fine-tuned run of ours")
    weights: Path | None = Field(None, description="its file, for a timm model; null: those that timm fetches")
    kind: Literal["hard", "soft"] = Field("hard", description="hard: its first choice is a label; soft: its probabilities are")
    temperature: float = Field(1.0, gt=0, description="that divides both's logits, of kind=soft")
    alpha: Fraction = Field(0.5, description="share of the teacher in the loss; the labels have the rest")
    token: bool = Field(True, description="a distillation token with a head of its own; false: one head learns from both")
    image_size: Size | None = Field(None, description="pixels it is shown; null: those that it was trained at")


class AugmentConfig(Section):
    scale: Area = Field((0.08, 1.0), description="area of the random crop")
    flip: Fraction = Field(0.5, description="probability of a horizontal flip")
    rand_augment: str | None = Field(None, description="timm's RandAugment, such as rand-m9-mstd0.5-inc1")
    mixup: float = Field(0.0, ge=0, description="alpha of mixup; 0: off")
    cutmix: float = Field(0.0, ge=0, description="alpha of cutmix; 0: off")
    switch: Fraction = Field(0.5, description="probability of cutmix where both are on")
    erasing: Fraction = Field(0.0, description="probability that a rectangle is erased by noise")


class TestConfig(SourceConfig):
    every: Every = Field(Duration(10, "%"), description="between two evaluations")
    crop_pct: Share = Field(1.0, description="central part that is looked at (0.875: resize 256, crop 224)")
    image_size: Size | None = Field(None, description="pixels that are looked at (FixRes); null: what is trained at")
    patience: Count | None = Field(None, description="evaluations without a better one after which the run ends; null: off")
    mistakes: NonNegativeInt = Field(
        40, description="misclassified images on a sheet, the surest first; not for labels=several"
    )


class TuningConfig(OptimConfig):
    decay: Decay = Field(
        "layers", description="all: everything; matrices: not vectors; layers: nor tokens and positions (BEiT, MAE)"
    )


class FinetuneConfig(ProgramConfig):
    """Everything ``python -m finetune`` can be told."""

    seeds: Count = Field(1, description="how many runs, of seed, seed + 1, ..., as NAME-seed0, ...; then mean and interval")
    encoder: str = Field(
        "newest",
        description="an export (folder, run or .safetensors), an official file, timm:TAG or hf:FOLDER; newest: the last one"
        " exported below run.dir",
    )
    weights: Literal["pretrained", "random"] = Field("pretrained", description="random: the same network from scratch")
    mode: Literal["full", "partial", "linear"] = Field(
        "full", description="what trains: everything; the last blocks and the head; the head alone"
    )
    blocks: Count | None = Field(None, description="how many of the last blocks train under mode=partial")
    ema: Beta | None = Field(None, description="momentum of an average of the weights, which is then judged; null: none")
    image_size: Size | None = Field(None, description="pixels; null: what the encoder was pretrained at")
    drop_path: Fraction = Field(0.1, description="stochastic depth of the last block; earlier ones linearly less")
    loss: Literal["ce", "bce"] = Field("ce", description="cross entropy, or bce: a yes or no for each class (DeiT III)")
    smoothing: Fraction = Field(0.0, description="label smoothing")
    labels: Literal["one", "several"] = Field(
        "one", description="of an image; several (or none): cat;dog in a list, numbers in .cls, labels in .json; needs loss=bce"
    )
    label_map: Annotated[dict[str, str | None], BeforeValidator(_names)] = Field(
        {}, description="other names of classes, as {tabby: cat, siamese: cat, blurred: null}: renamed, merged, dropped"
    )
    labelled: Annotated[int | str | None, BeforeValidator(_labelled)] = Field(
        None, description="images to train on, seeded: a class-balanced number (1000) or a share of each class (1%); null: all"
    )
    shots: Count | None = Field(None, description="images to train on of each class, instead of labelled")
    balance: Annotated[Fraction, BeforeValidator(_power)] = Field(
        0.0, description="classes are drawn by (their images)^(1 - this); true or 1: equally; 0.5: by the root; 0: as they are"
    )
    optim: TuningConfig = TuningConfig()
    head: HeadConfig = HeadConfig()
    teacher: TeacherConfig | None = None
    augment: AugmentConfig = AugmentConfig()
    test: TestConfig = TestConfig()
    onnx: bool = Field(False, description="write export/onnx/ at the end: the last classifier, seen to compute the same")

    @property
    def has_token(self) -> bool:
        """Whether the encoder has a distillation token."""
        return self.teacher is not None and self.teacher.token


def read(argv: Sequence[str]) -> tuple[FinetuneConfig | None, Command]:
    """The config of a command line, or None where help was all that was asked for. Raises ConfigError."""
    command = parse(argv, flags={"--plan": ()})
    if "--help" in command.flags:
        show(help_text("finetune", "Fine-tune a pretrained encoder for classification.", FinetuneConfig, FLAGS))
        return None, command
    return load(FinetuneConfig, command.config or DEFAULT, command.overrides), command
