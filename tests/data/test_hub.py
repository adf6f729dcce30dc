"""Hugging Face data sets without a network: saved ones, folders the library reads, columns, labels, and refusals."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest

from vitssl.data.sources import open_source
from vitssl.errors import ConfigError, DataError

datasets = pytest.importorskip("datasets", reason="the extra vitssl[hub] is not installed here")


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network and no cache but the test's own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_rows_are_read_as_they_are_stored(saved: Callable, encoded: Callable, label_of: Callable) -> None:
    source = open_source(saved())
    raws = source.read([39, 0, 39])
    assert [raw.image for raw in raws] == [encoded(39), encoded(0), encoded(39)]
    assert [raw.label for raw in raws] == [label_of(39), label_of(0), label_of(39)]
    assert raws[0].key == "all/39" and raws[0].where == f"{source.name}: row all/39"
    assert source.classes == ("a", "b", "c", "d") and source.chunks.tolist() == [13, 13, 14]


def test_splits_of_a_saved_data_set(rows: Callable, saved: Callable) -> None:
    both = saved(datasets.DatasetDict(train=rows(20), test=rows(5)))
    assert open_source(both).num_samples == 20 and open_source(both, split="test").num_samples == 5
    assert open_source(both, split="test").read([4])[0].key == "test/4"
    alone = os.path.join(both, "test")
    assert open_source(alone).num_samples == 5
    with pytest.raises(DataError, match=r"saved: has no split 'val', only train, test; set the split to one that is there"):
        open_source(both, split="val")
    with pytest.raises(ConfigError, match=r"saved/test: is one split, unnamed, so there is no 'train'; name no split"):
        open_source(alone, split="train")
    named = saved(datasets.Dataset(rows(5).data.table, split="test"), "named")
    assert open_source(named, split="test").read([4])[0].key == open_source(named).read([4])[0].key == "test/4"


def test_a_sub_folder_of_a_split_may_be_a_saved_data_set(rows: Callable, saved: Callable, tmp_path: Path) -> None:
    saved(rows(6), "folder/val")
    assert open_source(tmp_path / "folder", split="val").num_samples == 6


def test_a_folder_that_the_library_reads(classes: Callable) -> None:
    folder = classes("cat", "dog").name
    source = open_source(folder, kind="hub")
    assert source.classes == ("cat", "dog") and source.label_array().tolist() == [0, 0, 1, 1]
    raws = source.read(range(4))
    assert all(raw.image == Path(raw.where).read_bytes() for raw in raws) and raws[0].key == "train/0"
    Path(raws[0].where).unlink()
    (raw,) = source.read([0])
    assert raw.problem.endswith("cannot be read (No such file or directory); put it back and start again") and raw.passing
    os.mkfifo(raw.where)
    (raw,) = source.read([0])
    assert raw.problem == f"{raw.where}: is no file, but {folder} names it as an image; take it out" and not raw.passing


def test_a_data_set_from_elsewhere_names_no_file_of_this_machine(classes: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    found = datasets.load_dataset(classes("cat", "dog").name, split="train")
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **named: found)
    raws = open_source("user/name", kind="hub").read(range(4))
    assert all(
        raw.problem.endswith("is a file of this machine, but user/name names it as an image; take it out") for raw in raws
    )
    assert not any(raw.image or raw.passing for raw in raws)
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", os.path.dirname(os.path.dirname(raws[0].where)))
    assert all(raw.image for raw in open_source("user/name", kind="hub").read(range(4))), "the library fetched them"


def test_name_and_config_reach_the_library(rows: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **named: asked.append((given, named)) or rows(3))
    assert open_source("user/name@small", kind="hub", split="test").num_samples == 3
    open_source("user/name", kind="hub")
    assert asked == [(("user/name", "small"), {"split": "test"}), (("user/name", None), {"split": "train"})]


def test_what_cannot_be_loaded(photos: Path, saved: Callable) -> None:
    with pytest.raises(DataError, match=r"no/such: split 'train' cannot be loaded \(Couldn't reach 'no/such' on the Hub"):
        open_source("no/such", kind="hub")
    with pytest.raises(DataError, match=r"photos: split 'val' cannot be loaded \(Unknown split \"val\"") as error:
        open_source(photos, kind="hub", split="val")
    assert "\n" not in str(error.value)
    path = saved()
    Path(path, "state.json").write_text("{")
    with pytest.raises(DataError, match=r"saved: cannot be loaded \(.*\); save it to disk again"):
        open_source(path)
    with pytest.raises(ConfigError, match=r"kind=hub opens one path, and there are 2"):
        open_source(["a/b", "c/d"], kind="hub")


def labelled(rows: Callable, **columns: list) -> "datasets.Dataset":
    """Four pictures with these columns in place of the label."""
    data = rows(4).remove_columns("label")
    for name, values in columns.items():
        data = data.add_column(name, values)
    return data


LABELS = {
    "numbers": ({"label": [3, 0, 9, 9]}, [3, 0, 9, 9]),
    "another name": ({"cls": [3, 0, 9, 9], "size": [1, 1, 1, 1]}, [3, 0, 9, 9]),
    "one null": ({"label": [3, 0, None, 9]}, None),
    "one negative": ({"label": [3, 0, -1, 9]}, None),
    "words": ({"label": ["a", "b", "c", "d"]}, None),
    "none": ({}, None),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels(kind: str, rows: Callable, saved: Callable) -> None:
    columns, expected = LABELS[kind]
    source = open_source(saved(labelled(rows, **columns)))
    found = source.label_array()
    assert (found if found is None else found.tolist()) == expected and source.classes is None
    assert source.num_unlabelled == (0 if expected else 1 if kind.startswith("one") else 4)
    read = [raw.label for raw in source.read(range(4))]
    assert read == (expected or ([3, 0, None, 9] if kind.startswith("one") else [None] * 4))


def test_two_columns_of_classes_are_none_unless_one_is_named_label(rows: Callable, saved: Callable) -> None:
    fine = datasets.ClassLabel(names=["x", "y"])
    data = rows(4).add_column("fine", [0, 1, 0, 1]).cast_column("fine", fine)
    assert open_source(saved(data, "a")).classes == ("a", "b", "c", "d")
    assert not open_source(saved(data.rename_column("label", "coarse"), "b")).labels
    alone = open_source(saved(data.remove_columns("label"), "c"))
    assert alone.classes == ("x", "y") and alone.label_array().tolist() == [0, 1, 0, 1]


def test_columns_and_rows_that_are_refused(rows: Callable, saved: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    data = rows(4)
    with pytest.raises(
        DataError, match=r"a: no column holds images as bytes \(columns: label, text\); write them into a column"
    ):
        open_source(saved(data.remove_columns("image"), "a"))
    images = data.with_format("arrow")[:].column("image").to_pylist()
    two = data.add_column("mask", images).cast_column("mask", datasets.Image())
    with pytest.raises(DataError, match=r"b: 2 columns hold images \(image, mask\); keep one of them"):
        open_source(saved(two, "b"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **named: data.select([]))
    with pytest.raises(DataError, match=r"user/name: has no rows; name another data set or split"):
        open_source("user/name", kind="hub")


def test_an_image_without_bytes_is_empty(rows: Callable, saved: Callable) -> None:
    data = rows(2).to_list()
    data[1]["image"] = None
    source = open_source(saved(datasets.Dataset.from_list(data, features=rows(2).features)))
    assert [bool(raw.image) for raw in source.read([0, 1])] == [True, False] and not source.read([1])[0].problem


def test_fingerprint_is_of_rows_and_not_of_the_place(rows: Callable, saved: Callable) -> None:
    data = rows(6)
    others = [data.select(range(5)), data.select([1, 0, 2, 3, 4, 5]), data.remove_columns("label"), rows(6, first=1)]
    found = [open_source(saved(each, f"s{number}")).fingerprint for number, each in enumerate([data, *others])]
    assert len(set(found)) == 5
    assert open_source(saved(data.map(lambda row: row), "again")).fingerprint == found[0]


@pytest.mark.parametrize("kind", ["hub", "parquet"])
def test_without_the_library(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, f"vitssl.data.sources.{kind}", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    message = rf"kind={kind} needs \w+(\.parquet)?, which is not installed; pip install 'vitssl\[hub\]'"
    with pytest.raises(ConfigError, match=message):
        open_source("user/name", kind=kind)
