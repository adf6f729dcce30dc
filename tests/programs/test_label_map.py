"""Classes by their names: sets of every kind are joined by them, and a map renames, merges and drops."""

import csv
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from outcome import refused

from finetune.classes import open_classes, open_test
from finetune.config import FinetuneConfig
from finetune.predict import predictions
from vitssl.config import build
from vitssl.errors import ConfigError, DataError
from vitssl.report import Report

NAMES = ("cat", "dog", "owl")


def as_folder(folder: Path, labels: list[str], picture: Callable) -> Path:
    for number, name in enumerate(labels):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{number:02}.jpg").write_bytes(picture(number))
    return folder


def as_list(folder: Path, labels: list[str], picture: Callable) -> Path:
    as_folder(folder / "files", labels, picture)
    rows = [f"files/{name}/{number:02}.jpg,{name}" for number, name in enumerate(labels)]
    (folder / "list.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    return folder / "list.csv"


def as_shard(folder: Path, labels: list[str], picture: Callable) -> Path:
    """The classes in the order of their first image, in about.json."""
    classes = list(dict.fromkeys(labels))
    as_folder(folder / "files", labels, picture)
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number, name in enumerate(labels):
            tar.add(folder / f"files/{name}/{number:02}.jpg", f"{number:02}.jpg")
            (folder / "cls").write_text(str(classes.index(name)))
            tar.add(folder / "cls", f"{number:02}.cls")
    (folder / "about.json").write_text(json.dumps({"classes": classes}))
    return folder / "a.tar"


def as_saved(folder: Path, labels: list[str], picture: Callable) -> Path:
    datasets = pytest.importorskip("datasets")
    classes = list(dict.fromkeys(labels))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    rows = {"image": [{"bytes": picture(number), "path": None} for number in range(len(labels))]}
    rows |= {"label": [classes.index(name) for name in labels]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder / "saved")
    return folder / "saved"


KINDS = {"folder": as_folder, "list": as_list, "shard": as_shard, "saved": as_saved}
TRAIN, TEST = ["dog", "owl", "cat", "dog"], ["owl", "dog", "dog"]


def config(train: Path, test: Path, **settings) -> FinetuneConfig:
    return build(FinetuneConfig, {"data": {"path": str(train)}, "test": {"path": str(test)}} | settings, where="here")


def named(source) -> list[str]:
    """The class of each image by its name, as its number and as its sample says it."""
    told = [source.classes[label] for label in source.label_array()]
    assert told == [source.classes[raw.label] for raw in source.read(list(range(source.num_samples)))]
    return told


@pytest.mark.parametrize("train", KINDS)
@pytest.mark.parametrize("test", KINDS)
def test_sets_of_any_two_kinds_are_joined_by_name(train: str, test: str, tmp_path: Path, picture: Callable) -> None:
    """In another order, and with a class missing from the test set."""
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
    asked = config(
        KINDS[train](tmp_path / "train", TRAIN, picture), KINDS[test](tmp_path / "test", TEST, picture)
    )  # fmt: skip
    source = open_classes(asked)
    images = open_test(asked, source)
    assert images.classes == source.classes and sorted(named(source)) == sorted(TRAIN) and sorted(named(images)) == sorted(TEST)


def test_where_one_set_has_no_names_it_says_so(tmp_path: Path, picture: Callable) -> None:
    (tmp_path / "test").mkdir()
    asked = config(as_folder(tmp_path / "train", TRAIN, picture), as_list(tmp_path / "test", ["2", "0", "1"], picture))
    told: list[str] = []
    images = open_test(asked, open_classes(asked), lambda text, style: told.append(text))
    (words,) = told
    assert images.label_array().tolist() == [2, 0, 1]
    assert "train names its classes and" in words and "only numbers them" in words and "cat is 0" in words
    same = config(tmp_path / "train", tmp_path / "train")
    open_test(same, open_classes(same), lambda text, style: told.append(text))
    assert len(told) == 1


MAPS = {
    "renamed": ({"owl": "bird"}, ["dog", "bird", "cat", "dog"], ["bird", "dog", "dog"]),
    "merged": ({"cat": "pet", "dog": "pet"}, ["pet", "owl", "pet", "pet"], ["owl", "pet", "pet"]),
    "merged into one that is there": ({"owl": "cat"}, ["dog", "cat", "cat", "dog"], ["cat", "dog", "dog"]),
    "dropped": ({"dog": None}, ["owl", "cat"], ["owl"]),
    "swapped": ({"cat": "owl", "owl": "cat"}, ["dog", "cat", "owl", "dog"], ["cat", "dog", "dog"]),
    "of a class the test set lacks": ({"cat": "lion"}, ["dog", "owl", "lion", "dog"], ["owl", "dog", "dog"]),
}


@pytest.mark.parametrize("names, train, test", MAPS.values(), ids=MAPS)
def test_a_map(names: dict, train: list, test: list, tmp_path: Path, picture: Callable) -> None:
    (tmp_path / "test").mkdir()
    asked = config(as_list(tmp_path, TRAIN, picture), as_list(tmp_path / "test", TEST, picture), label_map=names)
    source = open_classes(asked)
    images = open_test(asked, source)
    assert named(source) == train and named(images) == test
    assert set(source.classes) == set(train) and np.bincount(source.label_array()).all()


def test_classes_of_the_test_set_alone_are_renamed_and_dropped(tmp_path: Path, picture: Callable) -> None:
    (tmp_path / "test").mkdir()
    test = as_list(tmp_path / "test", ["fox", "dog", "puppy", "owl"], picture)
    asked = config(as_list(tmp_path, TRAIN, picture), test, label_map={"fox": None, "puppy": "dog"})
    source = open_classes(asked)
    assert named(source) == TRAIN and named(open_test(asked, source)) == ["dog", "dog", "owl"]


def test_numbers_are_names_too(tmp_path: Path, picture: Callable) -> None:
    asked = config(as_list(tmp_path, ["0", "2", "1"], picture), tmp_path / "list.csv", label_map={2: "owl", 0: None})
    source = open_classes(asked)
    assert source.classes == ("1", "owl") and named(source) == ["owl", "1"]


def test_a_map_of_several_labels(tmp_path: Path, picture: Callable) -> None:
    path = as_list(tmp_path, TRAIN, picture)
    path.write_text(path.read_text().replace("00.jpg,dog", "00.jpg,dog;owl").replace("02.jpg,cat", "02.jpg,cat;owl"))
    asked = config(path, path, label_map={"cat": "pet", "dog": "pet", "owl": None}, labels="several", loss="bce")
    source = open_classes(asked)
    assert [raw.label for raw in source.read([0, 1, 2, 3])] == [(0,), (), (0,), (0,)]
    assert open_test(asked, source).classes == ("pet",)


def test_a_mapped_run_says_the_new_names(finetune: Callable, tmp_path: Path, picture: Callable) -> None:
    path = as_list(tmp_path, list(NAMES) * 6, picture)
    places = (f"data.path={path}", "data.split=null", f"test.path={path}", "test.split=null")
    run = finetune(tmp_path / "run", *places, "label_map={cat: pet, dog: pet}", "length=2").ok()
    assert run.losses()[0] == pytest.approx(np.log(2), rel=1e-6)
    with open(run.folder / "results/classes.csv") as file:
        assert [(row["class"], row["images"]) for row in csv.DictReader(file)] == [("pet", "12"), ("owl", "6")]
    found = {row["image"]: row for row in predictions(run.folder, [str(path)], Report())}
    assert [row["label"] for row in found.values()] == ["pet", "pet", "owl"] * 6
    assert sum(row["right"] for row in found.values()) / 18 == run.rows("probes.jsonl")[-1]["top1"]


def test_predict_judges_mapped_numbers_as_the_run_did(finetune: Callable, tmp_path: Path, picture: Callable) -> None:
    """Of 0 to 3, 0 is dropped and 3 joined to 1: the classes are 1 and 2, and their own numbers are 0 and 1."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(24):
            for extension, content in (("jpg", picture(number)), ("cls", str(number % 4).encode())):
                (tmp_path / "member").write_bytes(content)
                tar.add(tmp_path / "member", f"{number:02}.{extension}")
    places = (f"data.path={tmp_path}/a.tar", "data.split=null", f"test.path={tmp_path}/a.tar", "test.split=null")
    run = finetune(tmp_path / "run", *places, "label_map={0: null, 3: 1}", "length=2").ok()
    found = list(predictions(run.folder, [f"{tmp_path}/a.tar"], Report()))
    assert [row["label"] for row in found] == ["0", "1", "2", "1"] * 6
    judged, last = [row["right"] for row in found if "right" in row], run.rows("probes.jsonl")[-1]
    assert len(judged) == last["images"] == 18 and sum(judged) / 18 == last["top1"]


REFUSED = {
    "a class that is not there": ({"label_map": {"ow": "x"}}, ConfigError, r"label_map\.ow: .* no such class; did you mean"),
    "nothing like it": ({"label_map": {"zebra": None}}, ConfigError, r"label_map\.zebra: .* there are cat, dog, owl"),
    "nothing left": ({"label_map": dict.fromkeys(NAMES)}, DataError, r"no sample was chosen of 4; choose at least one"),
    "a mixture": (
        {"data": {"sources": [{"path": "{0}"}, {"path": "{0}"}]}, "label_map": {"owl": "x"}},
        ConfigError,
        r"label_map and data\.sources exclude each other",
    ),
    "a class of the test set alone": (
        {"label_map": {"owl": None}, "test": {"path": "{1}"}},
        DataError,
        r"1 classes are not among those of .*: fox; correct one",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_mapped(case: str, tmp_path: Path, picture: Callable) -> None:
    (tmp_path / "test").mkdir()
    settings, kind, message = REFUSED[case]
    train = as_list(tmp_path, TRAIN, picture)
    test = as_list(tmp_path / "test", ["fox", "dog"], picture)
    settings = json.loads(json.dumps(settings).replace("{0}", str(train)).replace("{1}", str(test)))
    asked = build(FinetuneConfig, {"data": {"path": str(train)}, "test": {"path": str(train)}} | settings, where="here")
    with pytest.raises(kind, match=message) as error:
        open_test(asked, open_classes(asked))
    assert "\n" not in str(error.value)


def test_a_map_reaches_the_command_line(finetune: Callable, tmp_path: Path) -> None:
    refused(finetune(tmp_path / "run", "label_map={9: x}"), "label_map.9: ")


def test_a_class_without_images_is_refused(finetune: Callable, tmp_path: Path, picture: Callable) -> None:
    path = as_shard(tmp_path, ["cat", "dog"] * 6, picture)
    (tmp_path / "about.json").write_text(json.dumps({"classes": ["cat", "dog", "owl"]}))
    places = (f"data.path={path}", "data.split=null", f"test.path={path}", "test.split=null", "length=1")
    told = "1 of 3 classes have no image (owl), so nothing could learn them; add images, or take them out: the folder, or"
    refused(finetune(tmp_path / "run", *places), told, "label_map={owl: null}")
    assert not (tmp_path / "run").exists()
    mapped = finetune(tmp_path / "mapped", *places, "label_map={owl: null}").ok()
    assert mapped.losses()[0] == pytest.approx(np.log(2), rel=1e-6) and "never told" not in mapped.out
    path = as_list(tmp_path, ["5", "6", "5", "7"], picture)  # numbers are not names: those between may be somebody else's
    places = (f"data.path={path}", "data.split=null", f"test.path={path}", "test.split=null", "length=1", "batch_size=4")
    told = "5 of 8 classes have no image to train on (0, 1, 2, and 2 more), so they are never told"
    assert told in finetune(tmp_path / "numbers", *places).ok().out


def test_a_class_folder_without_images_is_a_class(tmp_path: Path, picture: Callable) -> None:
    folder = as_folder(tmp_path / "files", ["dog", "owl", "dog"], picture)
    (folder / "cat").mkdir()
    (folder / ".thumbnails").mkdir()
    for settings in ({}, {"shots": 1}, {"balance": 1}):
        with pytest.raises(DataError, match=r"1 of 3 classes have no image \(cat\).*label_map=\{cat: null\}"):
            open_classes(config(folder, folder, **settings))
    asked = config(folder, folder, label_map={"cat": None})
    source = open_classes(asked)
    assert source.classes == ("dog", "owl") and named(source) == named(open_test(asked, source)) == ["dog", "dog", "owl"]
    with pytest.raises(DataError, match=r"all images are of one class, dog, so there is nothing to tell apart; add another"):
        open_classes(config(folder, folder, label_map={"cat": None, "owl": None}))
    (folder / "cat").rmdir()
    (tmp_path / "test/owl").mkdir(parents=True)
    as_folder(tmp_path / "test", ["dog"], picture)  # a test set may lack classes
    assert named(open_test(config(folder, tmp_path / "test"), open_classes(config(folder, folder)))) == ["dog"]
