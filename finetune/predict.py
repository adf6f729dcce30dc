"""``python -m finetune.predict RUN DATA...``: what a fine-tuned classifier sees in images, as a table or as lines of JSON.

``DATA`` is whatever ``data.path`` takes, or image files. Images are prepared and judged as in the run's own evaluation.
"""

import argparse
import glob
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from vitssl.errors import ConfigError
from vitssl.report import Report, program

SHOWN = 20  # images in the table of a terminal


def main(argv: Sequence[str]) -> int:
    """Read a command line and predict. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m finetune.predict", description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="a fine-tuning run's folder, or its export/last or export/best")
    parser.add_argument("data", nargs="+", help="images, a folder of them, shards: what data.path takes")
    parser.add_argument("--top", type=int, help="classes told of each image, where it has one label (5)")
    parser.add_argument("--threshold", type=float, help="probability above which one of several labels is told (0.5)")
    parser.add_argument("--jsonl", type=Path, help="write a line of JSON for every image")
    parser.add_argument("--batch-size", type=int, default=64, help="images looked at together (64)")
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="auto: that of the run's evaluation"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    given = parser.parse_args(argv)
    if (given.top is not None and given.top < 1) or given.batch_size < 1:
        raise ConfigError("--top and --batch-size are at least 1")
    if given.threshold is not None and not 0 <= given.threshold <= 1:
        raise ConfigError(f"--threshold {given.threshold}: is a probability, from 0 to 1")
    report, count, labelled, right = Report(), 0, 0, 0
    shown: list[tuple[str, str]] = []
    names = ("device", "precision", "batch_size", "top", "threshold")
    rows = predictions(given.run, given.data, report, **{name: getattr(given, name) for name in names})
    with _replaced(given.jsonl) as file:
        for row in rows:
            count, labelled, right = count + 1, labelled + ("right" in row), right + row.get("right", False)
            if file:
                file.write(json.dumps(row) + "\n")
            if len(shown) < SHOWN:
                said = row["top"] if "top" in row else row["labels"]
                shown.append((row["image"], ", ".join(f"{each['class']} {each['probability']:.1%}" for each in said) or "none"))
    more = f", the first {SHOWN}" if count > SHOWN else ""
    report.pairs(f"{count:,} images{more}", shown)
    if labelled:
        report.say(f"right of {labelled:,} with a label: {right / labelled:.2%}")
    if given.jsonl:
        report.say(f"{count:,} lines in {given.jsonl}")
    return 0


def predictions(
    run: Path,
    data: Sequence[str],
    report: Report,
    *,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int = 64,
    top: int | None = None,
    threshold: float | None = None,
) -> Iterator[dict[str, Any]]:
    """{"image", "top": [{"class", "probability"}, ...]} of every image that can be used, in order.

    Of one label ``top`` classes (5) are told; "label" is the image's own, where its source gives all images one, and "right"
    whether the first choice is that: left out for a label that is none of the classes. The run's ``label_map`` holds here, too.
    Of a classifier of several labels "labels" stand in the place of "top": all above ``threshold`` (0.5), the surest first.
    ``precision``: auto is that of the run's own evaluation.

    Raises CheckpointError where ``run`` holds no classifier, ConfigError for fp16 on a CPU, for a GPU that is not there and for
    a setting that is of the other kind of labels, DataError where no image can be used.
    """
    import torch

    from vitssl import dist
    from vitssl.data.augment import Normalize
    from vitssl.data.feed import evaluation_samples, share
    from vitssl.interop.ours import classifier_of, resized
    from vitssl.sections import DataConfig
    from vitssl.train.export import read_export
    from vitssl.views import View

    place = run / "export" / "last" if (run / "export" / "last").is_dir() else run
    state, facts = read_export(place, "classifier")
    device = dist.device_here(device, "--device ")
    model = classifier_of(state, facts).to(device)
    cast = _autocast(model, precision, facts.get("precision", "fp32"), device, report)
    size = tuple(facts.get("tested_size", facts["image_size"]))
    view = View(size=size, resize=resized(size, facts))
    channels = model.encoder.spec.channels
    normalize = Normalize(facts["mean"], facts["std"], channels=channels).to(device)
    classes, several = facts["classes"], facts.get("labels") == "several"
    renamed = facts.get("label_map") or {}
    if (top if several else threshold) is not None:
        kind, other = ("--top", "--threshold") if several else ("--threshold", "--top")
        raise ConfigError(f"{kind}: {run} tells {'several labels' if several else 'one label'} of an image; take {other}")
    threshold = 0.5 if threshold is None else threshold
    wanted = len(classes) if several else min(top or 5, len(classes))
    for folder, source in _opened(data):
        labels = source.labels and not several
        samples = evaluation_samples(source, DataConfig(**facts.get("decoding", {})), [view], channels=channels, labels=labels)
        for batch in share(samples, tell=report.say, batch_size=batch_size):
            with torch.inference_mode(), cast():
                logits = model(normalize(batch.views[view].to(device))).float()
            shares = logits.double().sigmoid() if several else logits.softmax(dim=1)
            values, numbers = shares.topk(wanted, dim=1)
            given = batch.labels.tolist() if labels else [None] * len(batch)
            for key, own, best, label in zip(batch.keys, values.tolist(), numbers.tolist(), given, strict=True):
                told = [{"class": classes[number], "probability": value} for number, value in zip(best, own, strict=True)]
                above = [each for each in told if each["probability"] > threshold]
                row = {"image": os.path.join(folder, key)} | ({"labels": above} if several else {"top": told})
                yield row | (_judged(label, source.classes, classes, renamed, told[0]["class"]) if labels else {})


def _judged(
    label: int, names: Sequence[str] | None, classes: Sequence[str], renamed: Mapping[str, str | None], first: str
) -> dict[str, Any]:
    """An image's label by its name, or where only numbers are given, by that of the class with its number.

    ``renamed`` is the run's ``label_map``: the label is told by its new name, and one that was dropped is not judged. Under a
    map, numbers are names themselves: those of the classes are no longer the labels'.
    """
    numbered = not renamed and 0 <= label < len(classes)
    name = names[label] if names else classes[label] if numbered else str(label)
    called = renamed.get(name, name)
    if called is None:
        return {"label": name}
    return {"label": called} | ({"right": called == first} if called in classes else {})


def _autocast(model: Any, asked: str, recorded: str, device: str, report: Report) -> Callable[[], AbstractContextManager]:
    """What is put around a forward, so that it computes as the run's evaluation did."""
    import torch

    precision = recorded if asked == "auto" else asked
    if precision == "fp16" and device == "cpu":
        if asked == "fp16":
            raise ConfigError("--precision fp16 needs a GPU; take bf16 or fp32")
        report.say("the run was evaluated in fp16, which needs a GPU; here it is fp32")
        precision = "fp32"
    if precision == "fp32":
        return nullcontext
    from vitssl.models.adapters.timm_vit import fuse_attention
    from vitssl.train.launch import fuses_attention

    if not fuses_attention(device, precision):
        fuse_attention(model, False)
    return partial(torch.autocast, device, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def _opened(data: Sequence[str]) -> list[tuple[str, Any]]:
    """(folder that its keys begin at, source) of all data: images one after the other are one source, and so are shards."""
    from vitssl.data.sources import open_source
    from vitssl.data.sources.patterns import PARQUET, TAR, is_shard, lies_beside
    from vitssl.data.stores import parted

    def kind(numbered: tuple[int, str]) -> Any:
        number, path = numbered
        if os.path.isfile(path) and _is_picture(path):
            return "images"
        return next((form.several for form in (TAR, PARQUET) if is_shard(parted(path)[1], form)), number)

    found = []
    data = [each for path in data for each in ([path] if os.path.exists(path) else sorted(glob.glob(path)) or [path])]
    data = [path for path in data if not lies_beside(path)] or data  # what a shell makes of shards/*
    for what, group in groupby(enumerate(data), key=kind):
        paths = [path for _, path in group]
        if what == "images":
            found.append(("", _listed(paths)))
        else:
            found.append((paths[0] if isinstance(what, int) else "", open_source(paths[0] if len(paths) == 1 else paths)))
    return found if len(found) > 1 else [("", found[0][1])]


@contextmanager
def _replaced(path: Path | None) -> Iterator[TextIO | None]:
    """The file that will stand at ``path``; what stands there already is replaced when all is written. Raises ConfigError."""
    if path is None:
        yield None
        return
    whole = path.exists() and not path.is_file()  # a pipe, or /dev/stdout
    unfinished = path if whole else path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = unfinished.open("w")
    except OSError as error:
        raise ConfigError(f"--jsonl {path}: cannot be written ({error.strerror}); name another file") from None
    try:
        with file:
            yield file
        if not whole:
            os.replace(unfinished, path)
    finally:
        if not whole:
            unfinished.unlink(missing_ok=True)


def _is_picture(path: str) -> bool:
    from vitssl.data.tarscan import IMAGES

    return path.rpartition(".")[2].lower() in IMAGES


def _listed(files: Sequence[str]) -> Any:
    """Image files, each a sample, as a source."""
    from vitssl.data.sources import open_source

    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(f"{os.path.abspath(path)}\n" for path in files))
        file.flush()
        source = open_source(file.name, kind="list")
    source.name = "the command line"  # in messages; nobody knows the list
    return source


if __name__ == "__main__":
    sys.exit(program(main, sys.argv[1:]))
