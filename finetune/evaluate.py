"""``python -m finetune.evaluate``: frozen encoders judged by published protocols, all from one extraction of their features.

``python -m finetune.evaluate protocol=all encoder=[runs/a,runs/b] data.path=TRAIN test.path=TEST`` answers which encoder is
best for these images: a row a protocol, a column an encoder. ``random:runs/a`` is the same network before any training.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from vitssl.command import help_text, parse
from vitssl.config import Count, Section, load
from vitssl.report import Report, program, show
from vitssl.sections import DataConfig, Share, Size, SourceConfig

PROTOCOLS = (
    "knn", "fewshot", "logistic", "linear_mae", "linear_moco_v3", "linear_dino", "linear_dinov2", "attentive", "spectrum",
)  # fmt: skip
EXAMPLE = "protocol=knn encoder=runs/demo data.path=TRAIN test.path=TEST"


def _known(names: str | list[str]) -> list[str]:
    names = [names] if isinstance(names, str) else names
    if "all" in names:
        return list(PROTOCOLS)
    for name in names:
        if name not in PROTOCOLS:
            raise ValueError(f"{name} is no protocol; take some of {', '.join(PROTOCOLS)}, or all")
    return names


class EvaluateConfig(Section):
    """Everything ``python -m finetune.evaluate`` can be told."""

    protocol: Annotated[str | list[str], AfterValidator(_known)] = Field("knn", description="one, a list, or all")
    encoder: str | list[str] = Field(
        "newest", description="exports, official files, timm:TAG, hf:FOLDER, random:EXPORT; newest: the last below runs"
    )
    data: DataConfig = Field(DataConfig(), description="labelled images that heads and neighbours are taken from")
    test: SourceConfig = Field(SourceConfig(), description="labelled images that are judged")
    pooling: Literal["mean", "class"] | None = Field(None, description="of the tokens; null: what each export says")
    image_size: Size | None = Field(None, description="pixels; null: what each encoder was trained at")
    crop_pct: Share = Field(0.875, description="central part that is looked at (0.875: resize 256, crop 224)")
    seeds: Count = Field(3, description="of what is drawn: few shots, the order of batches, first weights")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the encoder; heads are trained in fp32 or better")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if there is one")
    batch_size: Count = Field(128, description="images that an encoder looks at together, in each process")
    features: Path = Field(Path("features"), description="folder that keeps extracted features; delete it when you like")
    out: Path | None = Field(None, description="a .json that every row is written to")


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

    report = Report(active=dist.rank() == 0)
    rows = evaluate(config, report)
    if not rows:  # a process that helped
        return 0
    report.pairs("accuracy on the test images, 95 % interval (mean over seeds, +- deviation)", table(rows))
    if config.out is not None:
        config.out.write_text(json.dumps(rows, indent=1) + "\n")
        report.say(f"{len(rows):,} rows in {config.out}")
    return 0


def table(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(protocol and setting, a number for each encoder) in the order of the rows."""
    encoders = list(dict.fromkeys(row["encoder"] for row in rows))
    cells: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        shots = f" {row['setting']}" if row["protocol"] in ("fewshot", "knn") else ""
        cells[f"{row['protocol']}{shots}"][row["encoder"]].append(row)
    lines = [("", "   ".join(f"{_short(each):>24}" for each in encoders))] if len(encoders) > 1 else []
    for name, found in cells.items():
        lines.append((name, "   ".join(f"{_in_words(found[each]):>24}" if found[each] else " " * 24 for each in encoders)))
    return lines


def _short(encoder: str) -> str:
    """What an encoder is called in a column: its last part, behind what stands before a colon."""
    kind, colon, _ = encoder.partition(":")
    return f"{kind if colon else ''}{colon}{Path(encoder).name.rpartition(':')[2]}"[-24:]


def _in_words(rows: list[dict[str, Any]]) -> str:
    values = [row["value"] for row in rows]
    mean = sum(values) / len(values)
    if rows[0]["interval"] is None:
        return f"{mean:.4g} ({rows[0]['setting']})"
    if len(values) > 1:
        deviation = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
        return f"{mean:.2%} +- {deviation:.2%}"
    low, high = rows[0]["interval"]
    return f"{mean:.2%} [{low:.2%}, {high:.2%}]"


if __name__ == "__main__":
    sys.exit(program(main, sys.argv[1:]))
