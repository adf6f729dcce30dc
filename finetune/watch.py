"""What fine-tuning looks at on the way and at the end: the test images, what the classifier gets wrong, and when to stop."""

import csv
import io
import json
import shlex
from pathlib import Path
from typing import Any

import torch

from vitssl import dist
from vitssl.data.feed import evaluation_samples, share
from vitssl.data.sources import Source
from vitssl.inspect.charts import confusion_chart, drawable, mistakes_sheet
from vitssl.inspect.pictures import save_sheet
from vitssl.inspect.results import calibration_error, class_table, confusion, weakest
from vitssl.models.positions import check_size
from vitssl.models.spec import EncoderSpec
from vitssl.probes.protocols import wilson
from vitssl.train.export import write_export
from vitssl.train.loop import Event
from vitssl.train.predictions import Predictions, predict
from vitssl.train.session import Session
from vitssl.views import View

WEAKEST = 3  # classes that are named at the end


class Evaluation:
    """Accuracy on the test images on the way and at the end; the best classifier and the last are kept.

    Where an average of the weights is kept it is the one that is judged and written, and the raw weights stand beside it.
    ``ended``: whether ``test.patience`` evaluations have passed since the best one, as far as the run has come. ``measure`` is
    what the best is judged by; the larger the better.
    """

    measure, labels = "top1", "one"
    predict, means = staticmethod(predict), staticmethod(Predictions.means)

    def __init__(self, session: Session, images: Source, *, classes: tuple[str, ...]) -> None:
        self.session, self.classes = session, classes
        spec, config = session.engine.task.encoder.spec, session.config.test
        size = tested_size(config.image_size, spec)
        self.view = View(size=size, resize=round(min(size) / config.crop_pct))
        self.samples = evaluation_samples(images, session.config.data, [self.view], channels=spec.channels, labels=True)
        self.history = dist.gather_lists([self._written()])[0]  # the first process's: another machine may not have the file
        self.ended = self._out_of_patience()

    def event(self) -> Event:
        """The evaluation as something the loop does."""
        return Event(every=self.session.steps(self.session.config.test.every), act=self.act)

    def act(self, step: int) -> bool:
        """Measure, write the row, and keep the classifier if none was better. Returns whether the run has ended early."""
        session = self.session
        doors = ["logits"] if session.config.ema is None else ["averaged logits", "logits"]
        found = self.predict(session.engine, share(self.samples, tell=session.report.say), doors=doors)
        judged, *raw = found
        result = self._result(judged) | {f"raw_{name}": value for each in raw for name, value in self.means(each).items()}
        best = max((row[self.measure] for row in self.history), default=-1.0)
        row = {"step": step, **result, "images": len(found[0].labels)}
        self.history.append(row)
        session.report.scalars({f"test/{name}": value for name, value in result.items()}, step)
        session.report.rows("probes.jsonl", [row])
        session.report.say(f"step {step:,}  test {self.in_words(result)}")
        if session.engine.main:
            self._keep("last", step, result)
            if result[self.measure] > best:
                self._keep("best", step, result)
        self.ended = self._out_of_patience()
        if session.engine.main and (self.ended or step == session.plan.steps):
            self._write_results(found[0], step)
        return self.ended

    def finish(self) -> None:
        """Say what was made, where it lies, and how good it is."""
        self.session.report.rest()
        session, rows = self.session, self.history
        last, best = rows[-1], max(rows, key=lambda row: row[self.measure])
        which = "after the last step" if not self.ended else f"at step {last['step']:,}, where patience ended"
        report = [
            ("test", f"{self.in_words(last)} of {len(self.samples):,} images {which}"),
            *self._interval(last),
            ("best", f"{best[self.measure]:.2%} at step {best['step']:,} (chosen on the same images)"),
            ("classifier", f"{session.folder / 'export' / 'last' / 'classifier.safetensors'}, {_whose(session)}"),
        ]
        onnx = session.folder / "export" / "onnx" / "model.onnx"
        report.append(("ONNX", str(onnx) if session.config.onnx else f"{onnx_command(session.folder)}  (onnx=true does that)"))
        results = session.folder / "results"
        if (results / "results.json").exists():
            report += [("weakest", json.loads((results / "results.json").read_text())["weakest"])]
            report += [("results", f"{results}: {', '.join(sorted(path.name for path in results.iterdir()))}")]
        config = session.config
        origin = config.encoder if config.weights == "pretrained" else f"scratch ({config.encoder} untouched)"
        session.report.pairs(f"fine-tuned on {session.source.num_samples:,} labelled images from {origin}", report)

    def in_words(self, result: dict[str, float]) -> str:
        """An evaluation in one phrase."""
        raw = f"  raw weights {result['raw_top1']:.2%}" if "raw_top1" in result else ""
        scores = f"top-1 {result['top1']:.2%}  top-5 {result['top5']:.2%}"
        return f"{scores}  loss {result['loss']:.4f}  ece {result['ece']:.1%}{raw}"

    def _interval(self, last: dict[str, float]) -> list[tuple[str, str]]:
        low, high = last["top1_low"], last["top1_high"]
        return [("interval", f"{low:.2%} to {high:.2%} (95 %, over the drawing of the test images)")]

    def _result(self, judged: Predictions) -> dict[str, float]:
        means = judged.means()
        low, high = wilson(means["top1"], len(judged.labels))
        calibration = calibration_error(judged.confidence, judged.hits)
        return means | {"top1_low": low, "top1_high": high, "ece": calibration}

    def _out_of_patience(self) -> bool:
        """Whether the best evaluation lies as far back as ``test.patience`` says."""
        patience, tops = self.session.config.test.patience, [row[self.measure] for row in self.history]
        return bool(patience and tops) and len(tops) - 1 - tops.index(max(tops)) >= patience

    def _keep(self, which: str, step: int, result: dict[str, float]) -> None:
        """Write the classifier as timm's own: ``export/<which>/classifier.safetensors`` and ``.json``."""
        session = self.session
        encoder, head = session.engine.task.judged
        facts = {
            "architecture": encoder.architecture,
            "arguments": encoder.arguments_with(head.arguments),
            "image_size": list(encoder.spec.image_size),
            "tested_size": list(self.view.size),
            "crop_pct": session.config.test.crop_pct,
            "decoding": session.config.data.model_dump(include={"exif", "arrays", "max_pixels"}),
            "precision": session.engine.precision,
            "pos_resample": encoder.pos_resample,
            "stem": encoder.stem,
            "mean": list(session.config.data.mean),
            "std": list(session.config.data.std),
            "pooling": head.pooling,
            "classes": list(self.classes),
            "label_map": session.config.label_map,
            "run": str(session.folder),
            "step": step,
            "labels": self.labels,
            self.measure: result[self.measure],
        } | ({"head": head.beyond_timm} if head.beyond_timm else {})
        write_export(session.folder / "export" / which, "classifier", encoder.state() | head.state(), facts)

    def _write_results(self, found: Predictions, step: int) -> None:
        """``results/``: the table of the classes, the confusion matrix, the sheet of mistakes, and the numbers as JSON."""
        session, folder = self.session, self.session.folder / "results"
        counts = confusion(found.labels, found.predicted, len(self.classes))
        table = class_table(counts, self.classes)
        folder.mkdir(exist_ok=True)
        write_csv(folder / "classes.csv", [list(table[0]), *(list(row.values()) for row in table)])
        header = ["class", *self.classes]
        write_csv(folder / "confusion.csv", [header, *([name, *row] for name, row in zip(self.classes, counts.tolist()))])
        words = {"step": step, **self.history[-1], "weakest": weakest(table, WEAKEST), "classes": table}
        (folder / "results.json").write_text(json.dumps(words, indent=1) + "\n")
        pictures = {"confusion": confusion_chart(counts, self.classes)}
        if (sheet := self._mistakes(found)) is not None:
            pictures["mistakes"] = sheet
        else:
            (folder / "mistakes.png").unlink(missing_ok=True)
        for name, pixels in pictures.items():
            save_sheet(folder / f"{name}.png", pixels)
            session.report.images(f"test/{name}", pixels[None].numpy(), step)

    def _mistakes(self, found: Predictions) -> torch.Tensor | None:
        """The misclassified images the classifier was surest of, with their class, what they were taken for, and how surely."""
        wrong = (~found.hits).nonzero()[:, 0]
        surest = wrong[found.confidence[wrong].argsort(descending=True, stable=True)][: self.session.config.test.mistakes]
        if not len(surest):
            return None
        batch = self.samples.__getitems__(found.positions[surest].tolist())
        place = {position: row for row, position in enumerate(batch.positions.tolist())}
        shown = [index for index in surest.tolist() if int(found.positions[index]) in place]
        images = [batch.views[self.view][place[int(found.positions[index])]].float() / 255 for index in shown]
        names = drawable(self.classes)
        captions = [
            f"{names[int(found.labels[index])]}\n-> {names[int(found.predicted[index])]} {float(found.confidence[index]):.0%}"
            for index in shown
        ]
        return mistakes_sheet(images, captions) if images else None

    def _written(self) -> list[dict[str, Any]]:
        """Every evaluation of the run so far, as its file has it."""
        path = self.session.folder / "probes.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tested_size(asked: int | tuple[int, int] | None, spec: EncoderSpec) -> tuple[int, int]:
    """(height, width) of the test images. Positions are resampled to it, so any size will do that the patches divide: else
    ConfigError. Larger than trained at often is better (Touvron et al. 2019: random crops show objects enlarged)."""
    size = spec.image_size if asked is None else (asked, asked) if isinstance(asked, int) else tuple(asked)
    check_size(size, spec.patch, "test.image_size")
    return size


def onnx_command(folder: Path) -> str:
    """What writes the classifier of a finished run as ONNX."""
    return shlex.join(["vitssl", "export", str(folder), str(folder / "export" / "onnx"), "--to", "onnx"])


def _whose(session: Session) -> str:
    """Who reads the classifier."""
    return "read by finetune.predict and ONNX" if session.engine.task.head.beyond_timm else "a plain timm state"


def write_csv(path: Path, rows: list[list[Any]]) -> None:
    """Rows of cells as a file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    path.write_text(text.getvalue())
