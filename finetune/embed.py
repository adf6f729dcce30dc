"""``python -m finetune.embed``: the features that an encoder makes of images, written to files for other programs.

``python -m finetune.embed encoder=runs/a data.path=IMAGES out=FOLDER`` writes parquet, a memory-mapped ``.npy`` or tar shards,
with the key and the label of every image. Labels are optional. The same command goes on where it was stopped, under ``torchrun
-m`` with any number of processes, and the files are the same.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from vitssl.command import help_text, parse
from vitssl.config import Count, Section, load
from vitssl.errors import ConfigError
from vitssl.report import Report, program, show
from vitssl.sections import DataConfig, Share, Size

KINDS = ("class", "mean", "patches")
FLAGS = {"--bench": "images/s beside the encoder's bare forward; writes nothing"}
EXAMPLE = "python -m finetune.embed encoder=runs/demo data.path=IMAGES out=FOLDER kind=[class,patches] layer=[6,last]"


def _kinds(names: Any) -> list[str] | None:
    if names is None:
        return None
    names = names if isinstance(names, list) else [names]
    if not names or any(name not in KINDS for name in names):
        raise ValueError(f"takes some of {', '.join(KINDS)}")
    return list(dict.fromkeys(names))


def _layers(values: Any) -> list[int | str]:
    values = values if isinstance(values, list) else [values]
    if not values or any(value != "last" and (isinstance(value, bool) or not isinstance(value, int)) for value in values):
        raise ValueError("takes last, or numbers of blocks counted from 1")
    return list(dict.fromkeys(values))


class EmbedConfig(Section):
    """Everything ``python -m finetune.embed`` can be told."""

    encoder: str = Field(
        "newest", description="a run, an export, an official file, timm:TAG, hf:FOLDER, random:EXPORT or random:TIMM_NAME"
    )
    data: DataConfig = Field(DataConfig(), description="images; labels are optional")
    kind: Annotated[list[str] | None, BeforeValidator(_kinds)] = Field(
        None, description="class, mean (over patches) or patches [N, D], or a list; null: class or mean, as the export says"
    )
    layer: Annotated[list[int | str], BeforeValidator(_layers)] = Field(
        "last", description="output of this block, counted from 1, or last (the same as the encoder's depth), or a list"
    )
    norm: bool = Field(True, description="whether the encoder's final norm is applied to it, of whatever layer")
    out: Path | None = Field(None, description="a new folder, or one that this command was stopped in")
    format: Literal["parquet", "npy", "webdataset"] = Field(
        "parquet",
        description="tables; features.npy, keys.txt and labels.npy; or tar shards of NUMBER.npy, .cls and .txt (the key)",
    )
    dtype: Literal["fp32", "fp16"] = Field("fp32", description="of the numbers that are written")
    image_size: Size | None = Field(None, description="pixels; null: what the encoder was trained at")
    crop_pct: Share = Field(0.875, description="central part that is looked at (0.875: resize 256, crop 224)")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the encoder")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if there is one")
    batch_size: Count = Field(128, description="images that an encoder looks at together, in each process")
    rows: Count | None = Field(
        None, description="images of a file, and what a killed process loses; rounded up to whole batches; null: by size"
    )


def main(argv: Sequence[str]) -> int:
    """Read a command line and write features, or measure. Returns the exit code."""
    command = parse(argv, flags={"--bench": ()})
    if "--help" in command.flags:
        show(help_text("finetune.embed", f"Write an encoder's features, as in: {EXAMPLE}", EmbedConfig, FLAGS))
        return 0
    config = load(EmbedConfig, command.config, command.overrides)
    bench = "--bench" in command.flags
    if config.out is None and not bench:
        raise ConfigError("out: has no value; name a new folder for the features, as in out=features/photos")
    from finetune.embedding import measure, write
    from vitssl import dist

    report = Report(active=dist.rank() == 0)
    return measure(config, report) if bench else write(config, report)


if __name__ == "__main__":
    sys.exit(program(main, sys.argv[1:]))
