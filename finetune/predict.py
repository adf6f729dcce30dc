"""``python -m finetune.predict RUN DATA...``: what a fine-tuned classifier sees in images, as a table or as lines of JSON.

``DATA`` is whatever ``data.path`` takes, or image files. Images are prepared and judged as in the run's own evaluation.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from vitssl.errors import ConfigError
from vitssl.report import Report, program

SHOWN = 20  # images in the table of a terminal


def main(argv: Sequence[str]) -> int:
    """Read a command line and predict. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m finetune.predict", description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="a fine-tuning run's folder, or its export/last or export/best")
    parser.add_argument("data", nargs="+", help="images, a folder of them, shards: what data.path takes")
    parser.add_argument("--top", type=int, default=5, help="classes told of each image (5)")
    parser.add_argument("--threshold", type=float, default=0.5, help="probability above which one of several labels is told")
    parser.add_argument("--jsonl", type=Path, help="write a line of JSON for every image")
    parser.add_argument("--batch-size", type=int, default=64, help="images looked at together (64)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    given = parser.parse_args(argv)
    if given.top < 1 or given.batch_size < 1:
        raise ConfigError("--top and --batch-size are at least 1")
    if not 0 <= given.threshold <= 1:
        raise ConfigError(f"--threshold {given.threshold}: is a probability, from 0 to 1")
    report, count = Report(), 0
    shown: list[tuple[str, str]] = []
    options = {"device": given.device, "batch_size": given.batch_size, "top": given.top, "threshold": given.threshold}
    rows = predictions(given.run, given.data, report, **options)
    with open(given.jsonl, "w") if given.jsonl else nullcontext() as file:
        for row in rows:
            count += 1
            if file:
                file.write(json.dumps(row) + "\n")
            if len(shown) < SHOWN:
                said = row["top"] if "top" in row else row["labels"]
                shown.append((row["image"], ", ".join(f"{each['class']} {each['probability']:.1%}" for each in said) or "none"))
    more = f", the first {SHOWN}" if count > SHOWN else ""
    report.pairs(f"{count:,} images{more}", shown)
    if given.jsonl:
        report.say(f"{count:,} lines in {given.jsonl}")
    return 0


def predictions(
    run: Path,
    data: Sequence[str],
    report: Report,
    *,
    device: str = "auto",
    batch_size: int = 64,
    top: int = 5,
    threshold: float = 0.5,
) -> Iterator[dict[str, Any]]:
    """{"image", "top": [{"class", "probability"}, ...]} of every image that can be used, in order.

    Of a classifier of several labels "labels" stand in the place of "top": all above ``threshold``, the surest first.

    Raises CheckpointError where ``run`` holds no classifier, DataError where no image can be used.
    """
    import torch

    from vitssl.data.augment import Normalize
    from vitssl.data.feed import evaluation_samples, share
    from vitssl.data.sources import open_source
    from vitssl.interop.ours import classifier_of
    from vitssl.sections import DataConfig
    from vitssl.train.export import read_export
    from vitssl.views import View

    place = run / "export" / "last" if (run / "export" / "last").is_dir() else run
    state, facts = read_export(place, "classifier")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    model = classifier_of(state, facts).to(device)
    size = tuple(facts.get("tested_size", facts["image_size"]))
    view = View(size=size, resize=round(min(size) / facts.get("crop_pct", 1.0)))
    source = _listed(data) if all(os.path.isfile(path) and _is_picture(path) for path in data) else open_source(_one(data))
    channels = model.encoder.spec.channels
    samples = evaluation_samples(source, DataConfig(), [view], channels=channels)
    normalize = Normalize(facts["mean"], facts["std"], channels=channels).to(device)
    classes, several = facts["classes"], facts.get("labels") == "several"
    wanted = len(classes) if several else min(top, len(classes))
    with torch.inference_mode():
        for batch in share(samples, tell=report.say, batch_size=batch_size):
            logits = model(normalize(batch.views[view].to(device)))
            shares = logits.double().sigmoid() if several else logits.softmax(dim=1)
            values, numbers = shares.topk(wanted, dim=1)
            for key, own, best in zip(batch.keys, values.tolist(), numbers.tolist(), strict=True):
                told = [{"class": classes[number], "probability": value} for number, value in zip(best, own, strict=True)]
                above = [each for each in told if each["probability"] > threshold]
                yield {"image": key} | ({"labels": above} if several else {"top": told})


def _one(data: Sequence[str]) -> str | list[str]:
    return data[0] if len(data) == 1 else list(data)


def _is_picture(path: str) -> bool:
    from vitssl.data.tarscan import IMAGES

    return path.rpartition(".")[2].lower() in IMAGES


def _listed(files: Sequence[str]) -> Any:
    """Image files, each a sample, as a source."""
    from vitssl.data.sources import open_source

    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(f"{os.path.abspath(path)}\n" for path in files))
        file.flush()
        return open_source(file.name, kind="list")


if __name__ == "__main__":
    sys.exit(program(main, sys.argv[1:]))
