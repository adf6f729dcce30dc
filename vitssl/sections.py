"""The sections of a config that both programs share, with the defaults and the meaning of every key. No torch here."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, ValidationInfo, field_validator

from vitssl.config import Count, Every, Section, Time
from vitssl.schedule import Duration

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
"""A part of a whole that is not nothing."""
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Strength = Annotated[float, Field(ge=0.0)]
Decay = Literal["all", "matrices", "layers"]
"""Which of an encoder's parameters a weight decay is for."""
Size = Count | tuple[Count, Count]


def _lr_rule(value: str) -> str:
    if value != "none" and not re.fullmatch(r"(linear|sqrt)/[1-9]\d*", value):
        raise ValueError("is not a rule; write linear/256 (lr = base_lr x batch_size / 256), sqrt/1024 or none")
    return value


def _folder_name(value: Any) -> str:
    name = str(value) if isinstance(value, int) and not isinstance(value, bool) else value  # run.name=2026
    if not isinstance(name, str) or not name or name in (".", "..") or re.search(r"[/\\\0]", name):
        raise ValueError("is the name of one folder, without / or \\; quote what YAML would read as a number")
    return name


def ascending(value: tuple[float, float]) -> tuple[float, float]:
    """A range as it is. Raises ValueError, for whoever validates it, where the larger number comes first."""
    if value[0] > value[1]:
        raise ValueError("is no range; write the smaller first, as [0.2, 1.0]")
    return value


def _not_empty(value: tuple[float, float]) -> tuple[float, float]:
    if value[1] == 0:
        raise ValueError("leaves nothing of the image; write areas as [0.2, 1.0]")
    return value


Area = Annotated[tuple[Fraction, Fraction], AfterValidator(ascending), AfterValidator(_not_empty)]
"""Of a random crop, as a fraction of the image: from, to."""


class RunConfig(Section):
    name: Annotated[str, BeforeValidator(_folder_name)] = Field("run", description="folder of the run, below run.dir")
    dir: Path = Field(Path("runs"), description="where runs are kept")


class EncoderConfig(Section):
    name: str = Field("vit_base_patch16_224", description="any timm VisionTransformer, Eva (RoPE) or Beit")
    image_size: Size = Field(224, description="pixels, one number or [height, width]")
    patch_size: Size | None = Field(None, description="pixels; null: what the name says")
    channels: Count = Field(3, description="input channels")
    registers: NonNegativeInt | None = Field(None, description="register tokens after the class token; null: as the name says")
    class_token: bool | None = Field(None, description="whether there is a class token; null: as the name says")
    stem: Literal["t2t"] | None = Field(
        None, description="t2t: Tokens-to-Token, whose patches overlap, for what does not mask; null: as the name says"
    )
    positions: Literal["learned", "sincos", "sincos_moco_v3"] = Field(
        "learned", description="learned, or fixed 2-D sin-cos: columns first (MAE), or rows first (MoCo v3)"
    )
    pos_resample: Literal["timm", "mae", "dino"] = Field("timm", description="whose interpolation serves other image sizes")
    drop_path: Fraction = Field(0.0, description="stochastic depth of the last block")
    drop_path_shape: Literal["linear", "uniform"] = Field(
        "linear", description="earlier blocks have linearly less of it, or the same (DINOv2)"
    )
    weights_init: Literal["timm", "mae", "moco_v3", "dino", "dinov2", "msn", "beit", "jepa"] = Field(
        "timm", description="whose initialisation"
    )
    freeze_patch_embed: bool = Field(False, description="whether the patch embedding stays as it begins (MoCo v3)")
    arguments: dict[str, Any] = Field({}, description="further arguments of timm.create_model, such as depth or embed_dim")


class PlaceConfig(Section):
    path: str | list[str] | None = Field(
        None,
        description="shards (pattern, glob, list, folder, url), a folder of images, a file list, parquet files or a data set",
    )
    kind: Literal["auto", "shards", "folder", "list", "parquet", "hub", "demo"] = Field(
        "auto", description="what the path is; hub: a Hugging Face data set by its name, as user/name or user/name@config"
    )
    split: str | None = Field(
        None, description="sub-folder, prefix of the shards' names, or split of a data set, such as train"
    )


class SourceConfig(PlaceConfig):
    trusted_hosts: list[str] = Field([], description="hosts a redirect may lead to although their addresses are private")
    allow_shell_urls: bool = Field(False, description="whether pipe: urls, which run commands of the shell, are allowed")
    storage: dict[str, Any] = Field({}, description="options of s3, gs or hf file systems, as {anon: true}; never secrets")
    index_budget: Positive = Field(10.0, description="GB that indexing remote shards may read without being told to")
    cache: Path | None = Field(None, description="folder on a local disk that keeps what was read from remote shards")
    cache_size: Positive = Field(100.0, description="GB that it may hold; the least recently used goes first")


class WeightedConfig(PlaceConfig):
    weight: Positive = Field(1.0, description="its share of the samples, against the others' weights")


class DataConfig(SourceConfig):
    sources: list[WeightedConfig] = Field([], description="instead of path: several, mixed as [{path: ..., weight: 2}, ...]")
    workers: NonNegativeInt | None = Field(None, description="loader processes per training process; null: by spare cores")
    lanes: Count | None = Field(None, description="cuts through the epoch that a batch draws from; null: by size")
    window: Count = Field(1024, description="samples of a lane that are shuffled together, fewer where memory is short")
    memory: Positive = Field(1.0, description="GiB of remote data that are held in memory, over all lanes")
    repeats: Count = Field(1, description="augmented views of each decoded image; an epoch then shows fewer images")
    repeats_in: Literal["batch", "batches"] = Field(
        "batches", description="whether they meet in one batch, or follow each other"
    )
    exif: bool = Field(False, description="whether images (also those looked at) are turned as their camera noted")
    arrays: bool = Field(False, description="read .npy and multi-channel .tif too: uint8, uint16, bool, floats in 0..1")
    max_pixels: Count = Field(89_478_485, description="of one image, by its header; larger ones are not decoded")
    decode_seconds: Positive = Field(120.0, description="after which an image that hangs its loader process is replaced")
    max_bad_fraction: Fraction = Field(0.01, description="of the images, which may be unusable and are replaced; 0: none")
    quarantine: Path | None = Field(None, description="quarantine.jsonl of an earlier run: what it names is replaced")
    ledger: bool = Field(False, description="write position and key of every sample trained on to ledger/ of the run")
    mean: tuple[float, ...] | None = Field(None, description="per channel, in units of [0, 1]; null: the encoder's own")
    std: tuple[Positive, ...] | None = Field(None, description="per channel, in units of [0, 1]; null: the encoder's own")


class OptimConfig(Section):
    name: Literal["adamw", "sgd", "lars"] = Field(
        "adamw", description="AdamW, stochastic gradient descent with momentum (ViT's), or LARS (ResNets' contrast)"
    )
    base_lr: float = Field(1.5e-4, gt=0, description="learning rate before the rule")
    lr_rule: Annotated[str, AfterValidator(_lr_rule)] = Field(
        "linear/256", description="linear/256: lr = base_lr x batch_size / 256; sqrt/1024; none"
    )
    final_lr: float = Field(0.0, ge=0, description="absolute learning rate at the end of the half cosine or the line")
    warmup: Time = Field(Duration(5, "%"), description="linear warm-up, as 40ep, 5% or steps")
    start_lr: float = Field(0.0, ge=0, description="absolute learning rate at the beginning of the warm-up")
    milestones: list[Time] = Field([], description="of shape=multistep, as [700ep]: where the learning rate falls")
    gamma: Positive | None = Field(None, description="of shape=multistep: what it is multiplied by there; null: 0.1")
    shape: Literal["cosine", "linear", "constant", "multistep"] = Field(
        "cosine", validate_default=True, description="of the learning rate after the warm-up"
    )
    weight_decay: float = Field(0.05, ge=0, description="AdamW: decoupled; SGD, LARS: on the gradient")
    decay: Decay = Field(
        "matrices", description="all: everything (MoCo v3); matrices: not vectors (MAE, DINO); layers: nor tokens and positions"
    )
    final_weight_decay: float | None = Field(
        None, ge=0, description="at the end, along a half cosine from weight_decay (DINO); null: constant"
    )
    momentum: Beta = Field(0.9, description="SGD's and LARS's")
    trust: Positive = Field(0.001, description="LARS's step of a matrix, as a share of its size")
    layer_decay: float | None = Field(None, gt=0, le=1, description="learning rate x this per block below the last; null: off")
    patch_lr: Positive = Field(1.0, description="times the learning rate of the patch embedding (DINOv2: 0.2)")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW's moments")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    clip: float | None = Field(None, gt=0, description="largest norm of the gradient; null: none")
    clip_by: Literal["global", "module", "parameter"] = Field(
        "global", description="norm of all gradients, of the encoder's and each head's (DINOv2), or of each parameter's (DINO)"
    )

    @field_validator("start_lr")
    @classmethod
    def _starts(cls, value: float, info: ValidationInfo) -> float:
        if value and "warmup" in info.data and not info.data["warmup"].value:
            raise ValueError("is where a warm-up begins, and optim.warmup=0; leave one of the two out")
        return value

    @field_validator("shape")
    @classmethod
    def _has_its_own(cls, value: str, info: ValidationInfo) -> str:
        steps = value == "multistep"
        if steps and not info.data.get("milestones", True):
            raise ValueError("falls at optim.milestones, and there are none; write them as [700ep]")
        for key in ("milestones", "gamma") if not steps else ():
            if info.data.get(key):
                raise ValueError(f"has no steps, and optim.{key} is for shape=multistep; leave it out")
        if value in ("constant", "multistep") and info.data.get("final_lr"):
            raise ValueError(f"never comes to optim.final_lr={info.data['final_lr']:g}; leave that out")
        return value

    @field_validator("clip_by")
    @classmethod
    def _clips(cls, value: str, info: ValidationInfo) -> str:
        if value != "global" and info.data.get("clip", 1.0) is None:
            raise ValueError("says whose norm is bounded, and optim.clip gives no bound; set it, or leave this out")
        return value


class LaunchConfig(Section):
    engine: Literal["ddp", "zero1", "zero2"] = Field("ddp", description="who holds gradients and optimiser state")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field("auto", description="auto: bf16 where the hardware has it")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if there is one")
    compile: bool = Field(False, description="compile the encoder's blocks in place")
    checkpointing: bool = Field(False, description="recompute blocks in the backward pass instead of keeping activations")


class LogConfig(Section):
    every: Count = Field(10, description="steps between two lines")
    trackers: list[str] = Field(["tensorboard"], description="Accelerate's trackers by name; [] for none")


class CheckpointConfig(Section):
    every: Every | None = Field(Duration(5, "%"), description="steps, epochs or share of the run between two; null: off")
    minutes: float | None = Field(10.0, gt=0, description="minutes between two checkpoints; null: off")
    keep_last: Count = Field(2, description="newest checkpoints kept")
    keep_every: Every | None = Field(None, description="the first at or after each multiple of this is kept for good")


class InitConfig(Section):
    resume: Path | None = Field(None, description="another run's folder to continue from, if this one has no checkpoint")


class PhotometricConfig(Section):
    """How colours are changed on the device, as in torchvision's ColorJitter and MoCo v3; MAE's paper leaves them alone."""

    jitter: Fraction = Field(0.0, description="probability of changed brightness, contrast, saturation and hue")
    brightness: Strength = Field(0.4, description="factor in 1 -+ this")
    contrast: Strength = Field(0.4, description="factor in 1 -+ this")
    saturation: Strength = Field(0.2, description="factor in 1 -+ this")
    hue: float = Field(0.1, ge=0, le=0.5, description="turned by up to this share of a circle")
    grey: Fraction = Field(0.0, description="probability of no colours")
    blur: Fraction = Field(0.0, description="probability of a Gaussian blur")
    sigma: tuple[Positive, Positive] = Field((0.1, 2.0), description="of the blur in pixels, uniform between the two")
    solarize: Fraction = Field(0.0, description="probability of inverting what is brighter than half")


class ProgramConfig(Section):
    """What pretrain and finetune have in common. Their own configs add their method and their evaluation."""

    run: RunConfig = RunConfig()
    seed: int = Field(0, ge=0, lt=2**63, description="of order, crops, masks, initialisation and dropout")
    data: DataConfig = Field(DataConfig(), description="what is trained on")
    batch_size: Count = Field(256, description="GLOBAL batch: images per optimiser step over all processes")
    micro_batch: Count | None = Field(None, description="images per process and forward; null: what fits")
    length: Time = Field(Duration(100, "ep"), description="of the run: epochs (300ep) or steps (12_500)")
    optim: OptimConfig = OptimConfig()
    launch: LaunchConfig = LaunchConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    init: InitConfig = InitConfig()


CHANGEABLE = (
    "length",
    "launch",
    "log",
    "checkpoint",
    "run",
    "micro_batch",
    "data.workers",
    "data.ledger",
    "data.trusted_hosts",
    "data.allow_shell_urls",
    "data.storage",
    "data.index_budget",
    "data.cache",
    "data.cache_size",
    "data.memory",
    "data.decode_seconds",
    "data.max_bad_fraction",
    "probe",
    "heldout",
    "health",
    "test",
    "onnx",
    "init.resume",
)
"""Keys that may differ between a run and its continuation: they change no sample, no draw and no update rule."""
