"""Runs on images of several labels: where they begin, what they measure and leave, and that predict says the same."""

import csv
import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from outcome import refused
from sklearn.metrics import average_precision_score, f1_score

from finetune.predict import main as predict
from vitssl.errors import ConfigError

NAMES = ("bird", "cat", "dog")
SEVERAL = ("labels=several", "loss=bce")


def labels_of(number: int) -> list[str]:
    return [name for bit, name in enumerate(NAMES) if number % 8 >> bit & 1]


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory, picture: Callable) -> Path:
    """40 images to train on and 16 to test, of none to three labels."""
    folder = tmp_path_factory.mktemp("lists")
    for number in range(56):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    for name, numbers in {"train": range(40), "test": range(40, 56)}.items():
        rows = [f"{number}.jpg,{';'.join(labels_of(number))}" for number in numbers]
        (folder / f"{name}.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
    return folder


def places(lists: Path) -> list[str]:
    return [f"data.path={lists}/train.csv", "data.split=null", f"test.path={lists}/test.csv", "test.split=null"]


@pytest.fixture(scope="module")
def tuned(finetune: Callable, lists: Path, tmp_path_factory: pytest.TempPathFactory):
    settings = (*SEVERAL, "optim.base_lr=1e-2", "ema=0.5", "checkpoint.keep_last=9", "test.every=6")
    return finetune(tmp_path_factory.mktemp("several") / "run", *places(lists), *settings).ok()


def test_it_begins_at_ln_2_and_measures(tuned) -> None:
    assert tuned.losses()[0] == pytest.approx(math.log(2), rel=1e-6)
    row = tuned.rows("probes.jsonl")[-1]
    assert {"map", "micro_f1", "macro_f1", "loss", "raw_map", "images"} <= set(row) and "top1" not in row
    assert f"mAP {row['map']:.2%}" in tuned.out and "probability above 0.5" in tuned.out
    facts = json.loads((tuned.folder / "export/last/classifier.json").read_text())
    assert facts["labels"] == "several" and facts["classes"] == list(NAMES) and facts["map"] == row["map"]
    assert "classes: 3, of which an image may have several" in (tuned.folder / "export/last/README.md").read_text()
    assert sorted(path.name for path in (tuned.folder / "results").iterdir()) == ["classes.csv", "results.json"]


def test_predict_says_what_the_evaluation_said(tuned, lists: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """From its lines of JSON alone scikit-learn finds the run's own numbers."""
    images = [str(lists / f"{number}.jpg") for number in range(40, 56)]
    found = {}
    for threshold in ("0", "0.5"):
        assert predict([str(tuned.folder), *images, "--jsonl", f"{tmp_path}/rows.jsonl", "--threshold", threshold]) == 0
        found[threshold] = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert "16 images" in capsys.readouterr().out
    hot = np.array([[name in labels_of(number) for name in NAMES] for number in range(40, 56)])
    scores = [{each["class"]: each["probability"] for each in row["labels"]} for row in found["0"]]
    scores = np.array([[row[name] for name in NAMES] for row in scores])
    told = np.array([[name in {each["class"] for each in row["labels"]} for name in NAMES] for row in found["0.5"]])
    assert (told == (scores > 0.5)).all()
    row = tuned.rows("probes.jsonl")[-1]
    assert row["map"] == pytest.approx(average_precision_score(hot, scores), rel=1e-6)
    assert row["micro_f1"] == pytest.approx(f1_score(hot, told, average="micro", zero_division=0))
    assert row["macro_f1"] == pytest.approx(f1_score(hot, told, average="macro", zero_division=0))
    losses = -np.where(hot, np.log(scores), np.log(1 - scores))
    assert row["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    with open(tuned.folder / "results/classes.csv") as file:
        table = list(csv.DictReader(file))
    assert [each["class"] for each in table] == list(NAMES) and [int(each["images"]) for each in table] == hot.sum(0).tolist()
    expected = average_precision_score(hot, scores, average=None)
    np.testing.assert_allclose([float(each["ap"]) for each in table], expected, rtol=1e-6)


def test_resumed_and_in_two_processes_it_is_the_same(tuned, finetune: Callable, lists: Path, tmp_path: Path) -> None:
    import shutil

    settings = (*SEVERAL, "optim.base_lr=1e-2", "ema=0.5", "checkpoint.keep_last=9", "test.every=6")
    shutil.copytree(tuned.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000012")
    run = finetune(tmp_path / "run", *places(lists), *settings).ok()
    assert "from step 6" in run.out and run.rows("probes.jsonl") == tuned.rows("probes.jsonl")
    calm = (*places(lists), *SEVERAL, "drop_path=0", "length=4")
    one, two = finetune(tmp_path / "one", *calm).ok(), finetune(tmp_path / "two", *calm, processes=2).ok()
    np.testing.assert_allclose(two.losses(), one.losses(), rtol=1e-5)
    assert two.rows("probes.jsonl")[-1] == pytest.approx(one.rows("probes.jsonl")[-1], rel=1e-4)


def test_shards_with_mixup(finetune: Callable, lists: Path, tmp_path: Path) -> None:
    for name, numbers in {"train": range(40), "test": range(40, 56)}.items():
        with tarfile.open(tmp_path / f"{name}-0.tar", "w") as tar:
            for number in numbers:
                tar.add(lists / f"{number}.jpg", f"{number:04}.jpg")
                (tmp_path / "cls").write_text(json.dumps({"labels": [NAMES.index(name) for name in labels_of(number)]}))
                tar.add(tmp_path / "cls", f"{number:04}.json")
    shards = (f"data.path={tmp_path}", f"test.path={tmp_path}")
    run = finetune(tmp_path / "run", *shards, *SEVERAL, "augment.mixup=0.8", "augment.cutmix=1", "smoothing=0.1").ok()
    assert run.losses()[0] == pytest.approx(math.log(2), rel=1e-6) and len(set(run.losses())) > 2
    assert run.rows("probes.jsonl")[-1]["images"] == 16


def test_single_labels_with_bce(finetune: Callable, tmp_path: Path) -> None:
    run = finetune(tmp_path / "run", "loss=bce", "augment.mixup=0.8", "smoothing=0.1").ok()
    assert run.losses()[0] == pytest.approx(math.log(2), rel=1e-6) and "top1" in run.rows("probes.jsonl")[-1]


REFUSED = {
    "cross entropy": (["labels=several"], "labels=several needs loss=bce: loss=ce takes one class of an image"),
    "balance": ([*SEVERAL, "balance=true"], "labels=several and balance=1.0 exclude each other"),
    "shots": ([*SEVERAL, "shots=2"], "labels=several and shots=2 exclude each other"),
    "a teacher": ([*SEVERAL, "teacher.name=x"], "labels=several and teacher exclude each other"),
    "other classes": ([*SEVERAL, "test.path={0}/other.csv"], "1 classes are not among those of"),
    "a map that leaves nothing": (
        [*SEVERAL, "test.path={0}/cats.csv", "label_map={{cat: null}}"],
        "label_map leaves no test image a label",
    ),
    "several without being asked": (["data.path={0}/odd"], "take labels=several"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be(finetune: Callable, lists: Path, write_shard: Callable, tmp_path: Path, case: str) -> None:
    argv, words = REFUSED[case]
    (lists / "other.csv").write_text("path,label\n1.jpg,cat;horse\n")
    (lists / "cats.csv").write_text("path,label\n1.jpg,cat\n")
    (lists / "odd").mkdir(exist_ok=True)
    write_shard(lists / "odd/a.tar", range(2), label=lambda number: "1 2")
    refused(finetune(tmp_path / "run", *places(lists), *(each.format(lists) for each in argv)), words)


def test_a_threshold_is_a_probability(tuned) -> None:
    with pytest.raises(ConfigError, match=r"--threshold 2.0: is a probability, from 0 to 1"):
        predict([str(tuned.folder), "x", "--threshold", "2"])
    with pytest.raises(ConfigError, match=r"--top: .* tells several labels of an image; take --threshold"):
        predict([str(tuned.folder), "x", "--top", "2"])
