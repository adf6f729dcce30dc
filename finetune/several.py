"""What fine-tuning looks at where images have several labels: average precision and F1, class by class and together."""

import json
from collections.abc import Sequence
from typing import Any

import torch

from finetune.watch import WEAKEST, Evaluation, write_csv
from vitssl.losses.classes import binary_cross_entropy
from vitssl.probes.several import average_precision, count_answers, micro_f1
from vitssl.train.predictions import SetPredictions, predict_sets

THRESHOLD = 0.5  # probability above which a label is told


def set_means(found: SetPredictions) -> dict[str, float]:
    """Loss, mAP over the classes that some image has, and F1 of the labels that are told."""
    there = found.labels.any(dim=0)
    counts = count_answers(found.logits.double().sigmoid() > THRESHOLD, found.labels)
    return {
        "loss": float(binary_cross_entropy(found.logits.double(), found.labels)),
        "map": float(average_precision(found.logits, found.labels)[there].mean()),
        "micro_f1": micro_f1(counts) if bool(there.any()) else 0.0,
        "macro_f1": float(torch.nan_to_num(counts.f1)[there].mean()),
    }


class SeveralEvaluation(Evaluation):
    """The best is judged by mAP: the mean over classes that some test image has; so is macro F1."""

    measure, labels = "map", "several"
    predict, means = staticmethod(predict_sets), staticmethod(set_means)

    def in_words(self, result: dict[str, float]) -> str:
        """An evaluation in one phrase."""
        raw = f"  raw weights {result['raw_map']:.2%}" if "raw_map" in result else ""
        f1 = f"F1 {result['micro_f1']:.2%} (macro {result['macro_f1']:.2%})"
        return f"mAP {result['map']:.2%}  {f1}  loss {result['loss']:.4f}{raw}"

    def _interval(self, last: dict[str, float]) -> list[tuple[str, str]]:
        return [("threshold", f"F1 counts labels of a probability above {THRESHOLD}")]

    def _result(self, judged: SetPredictions) -> dict[str, float]:
        return set_means(judged)

    def _write_results(self, found: SetPredictions, step: int) -> None:
        """``results/``: the table of the classes, and the numbers as JSON."""
        folder = self.session.folder / "results"
        table = class_table(found, self.classes)
        folder.mkdir(exist_ok=True)
        write_csv(folder / "classes.csv", [list(table[0]), *(list(row.values()) for row in table)])
        known = sorted((row for row in table if row["ap"] is not None), key=lambda row: row["ap"])[:WEAKEST]
        weakest = ", ".join(f"{row['class']} {row['ap']:.1%}" for row in known)
        words = {"step": step, **self.history[-1], "threshold": THRESHOLD, "weakest": weakest, "classes": table}
        (folder / "results.json").write_text(json.dumps(words, indent=1) + "\n")


def class_table(found: SetPredictions, classes: Sequence[str]) -> list[dict[str, Any]]:
    """A row a class, in their order: images that have it, and None for what cannot be said of one that none has."""
    precision = average_precision(found.logits, found.labels)
    counts = count_answers(found.logits.double().sigmoid() > THRESHOLD, found.labels)
    rows = []
    for number, name in enumerate(classes):
        right, wrong, missing = (int(each[number]) for each in counts)
        images = right + missing
        rows.append({
            "class": name,
            "images": images,
            "ap": float(precision[number]) if images else None,
            "f1": float(counts.f1[number]) if images else None,
            "recall": right / images if images else None,
            "precision": right / (right + wrong) if right + wrong else None,
        })  # fmt: skip
    return rows
