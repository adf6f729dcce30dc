"""``python -m finetune.evaluate``: frozen encoders judged by published protocols, all from one extraction of their features.

``python -m finetune.evaluate protocol=all encoder=[runs/a,runs/b] data.path=TRAIN test.path=TEST`` answers which encoder is
best for these images: a row a protocol, a column an encoder. ``random:runs/a`` is the same network before any training. Several
data sets are named under ``datasets``.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from vitssl.command import help_text, parse
from vitssl.config import Count, Section, load
from vitssl.errors import ConfigError
from vitssl.report import Report, program, show
from vitssl.sections import DataConfig, Share, Size, SourceConfig

PROTOCOLS = (
    "knn", "fewshot", "ridge", "logistic", "linear_mae", "linear_moco_v3", "linear_dino", "linear_dinov2", "attentive",
    "spectrum",
)  # fmt: skip
FINETUNE = "finetune"
EXAMPLE = "protocol=knn encoder=runs/demo data.path=TRAIN test.path=TEST"


def _known(names: str | list[str]) -> list[str]:
    names = [names] if isinstance(names, str) else names
    if not names:
        raise ValueError(f"is empty; take some of {', '.join(PROTOCOLS)}, {FINETUNE}, or all")
    for name in names:
        if name not in (*PROTOCOLS, FINETUNE, "all"):
            raise ValueError(f"{name} is no protocol; take some of {', '.join(PROTOCOLS)}, {FINETUNE}, or all")
    return list(dict.fromkeys(each for name in names for each in (PROTOCOLS if name == "all" else (name,))))


def _named(names: str | list[str]) -> str | list[str]:
    if not names:
        raise ValueError("is empty; name at least one")
    return names


def _files(paths: Any) -> Any:
    paths = paths if isinstance(paths, list) else [] if paths is None else [paths]
    for path in paths:
        if Path(path).suffix not in (".json", ".html"):
            raise ValueError(f"{path} ends neither in .json (every row) nor in .html (a page to read)")
    return paths


class SetConfig(Section):
    """One of several data sets."""

    data: DataConfig = Field(DataConfig(), description="labelled images that heads and neighbours are taken from")
    test: SourceConfig = Field(SourceConfig(), description="labelled images that are judged")


class EvaluateConfig(Section):
    """Everything ``python -m finetune.evaluate`` can be told."""

    protocol: Annotated[str | list[str], AfterValidator(_known)] = Field(
        "knn", description="one, a list, or all: every one but finetune, which trains whole networks (protocol=[all,finetune])"
    )
    encoder: Annotated[str | list[str], AfterValidator(_named)] = Field(
        "newest",
        description="exports, official files, timm:TAG, hf:FOLDER, random:EXPORT or TIMM_NAME; newest: last below runs",
    )
    data: DataConfig = Field(DataConfig(), description="labelled images that heads and neighbours are taken from")
    test: SourceConfig = Field(SourceConfig(), description="labelled images that are judged")
    datasets: dict[str, SetConfig] = Field(
        {}, description="several, instead of data and test: {NAME: {data: {path: TRAIN}, test: {path: TEST}}, ...}"
    )
    pooling: Literal["mean", "class"] | None = Field(None, description="of the tokens; null: what each export says")
    image_size: Size | None = Field(None, description="pixels; null: what each encoder was trained at")
    crop_pct: Share = Field(0.875, description="central part that is looked at (0.875: resize 256, crop 224)")
    crops: Count = Field(
        1,
        description="of linear protocols: random crops (area 0.08 to 1, flips) of each training image that are extracted; epoch"
        " e is shown number e mod this, where the papers take new ones each epoch; 1: the centre crop",
    )
    seeds: Count = Field(3, description="of what is drawn: few shots, the order of batches, first weights")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the encoder; heads are trained in fp32 or better")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if there is one")
    batch_size: Count = Field(128, description="images that an encoder looks at together, in each process")
    finetune: dict[str, Any] = Field(
        {}, description="of protocol=finetune: settings of python -m finetune that replace its own, as {length: 50ep}"
    )
    features: Path = Field(
        Path("features"), description="folder that keeps features and fine-tuning runs; delete it when you like"
    )
    out: Annotated[list[Path], BeforeValidator(_files)] = Field(
        [], description="files to write: a .json of every row, an .html page of the table; one or a list"
    )

    @property
    def sets(self) -> dict[str, SetConfig]:
        """Data sets by name, of which there is at least one. Raises ConfigError where they are given in both ways."""
        alone = SetConfig(data=self.data, test=self.test)
        if self.datasets and alone != SetConfig():
            raise ConfigError("datasets, and data or test beside it, are both given; put each set's settings below its name")
        return self.datasets or {str(self.test.path): alone}


def main(argv: Sequence[str]) -> int:
    """Read a command line, evaluate, print the table. Returns the exit code."""
    command = parse(argv, flags={})
    if "--help" in command.flags:
        summary = f"Judge frozen encoders, as in: python -m finetune.evaluate {EXAMPLE}"
        show(help_text("finetune.evaluate", summary, EvaluateConfig, {}))
        return 0
    config = load(EvaluateConfig, command.config, command.overrides)
    from finetune.judging import evaluate
    from vitssl import dist
    from vitssl.inspect.comparison import compared, comparison_page, in_lines

    report = Report(active=dist.rank() == 0)
    for path in config.out:  # before hours pass
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise ConfigError(f"out={path}: is a folder; give the name of a file")
    rows, facts = evaluate(config, report)
    if dist.rank():  # a process that helped
        return 0
    sets = compared(rows)
    for name, lines in sets.items():
        of = "" if len(sets) == 1 else f"{name}: "
        report.pairs(f"{of}accuracy on the test images, 95 % interval (mean over seeds, +- deviation)", in_lines(lines))
    facts["command"] = command.typed("finetune.evaluate", launched=dist.world() > 1)
    for path in config.out:
        page = path.suffix == ".html"
        path.write_text(comparison_page(sets, facts) if page else json.dumps(rows, indent=1) + "\n")
        report.say(f"{len(rows):,} rows in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(program(main, sys.argv[1:]))
