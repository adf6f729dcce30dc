"""Several labels an image: as lists and shards say them, once each, under another's numbers, and in batches."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from vitssl.data.feed import evaluation_samples
from vitssl.data.sources import Several, open_source, several_labels, several_like
from vitssl.data.sources.several import renumbered
from vitssl.errors import DataError
from vitssl.sections import DataConfig
from vitssl.views import View


def jpeg(number: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 40 % 256, 0, 0)).save(buffer, format="JPEG")
    return buffer.getvalue()


def write_list(folder: Path, cells: list[str], *, column: str = "label", name: str = "list.csv") -> Path:
    for number in range(len(cells)):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    lines = [f"path,{column}", *(f"{number}.jpg,{cell}" for number, cell in enumerate(cells))]
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def write_tar(path: Path, samples: list[dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for number, members in enumerate(samples):
            for extension, content in {"jpg": jpeg(number), **members}.items():
                info = tarfile.TarInfo(f"{number:03}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def sets(source: Several) -> list[tuple[int, ...]]:
    return [raw.label for raw in source.read(list(range(source.num_samples)))]


LISTS = {
    "names are sorted": (["dog; cat", "cat", "", "bird"], [(1, 2), (1,), (), (0,)], ("bird", "cat", "dog")),
    "numbers stay": (["0;3", "3", "", "1"], [(0, 3), (3,), (), (1,)], ("0", "1", "2", "3")),
    "each once": (["cat;cat;dog", "dog"], [(0, 1), (1,)], ("cat", "dog")),
}


@pytest.mark.parametrize("cells, expected, classes", LISTS.values(), ids=LISTS)
def test_lists(tmp_path: Path, cells: list[str], expected: list, classes: tuple):
    source = several_labels(open_source(write_list(tmp_path, cells)))
    assert sets(source) == expected and source.classes == classes and source.num_classes == len(classes)
    assert source.counts().tolist() == [sum(number in each for each in expected) for number in range(len(classes))]


SHARD = [
    ({"cls": b"2 0"}, (0, 2)),
    ({"cls": b"1"}, (1,)),
    ({"cls": b" 3,1\n"}, (1, 3)),
    ({"json": b'{"labels": [1, 0], "label": 7}'}, (0, 1)),
    ({"json": b'{"labels": []}'}, ()),
    ({"json": b'{"label": 2}'}, (2,)),
]


def test_shards_and_their_sidecar(tmp_path: Path):
    members, expected = zip(*SHARD, strict=True)
    write_tar(tmp_path / "a.tar", list(members))
    write_tar(tmp_path / "b.tar", list(members[:2]))
    source = several_labels(open_source(tmp_path))
    assert sets(source) == [*expected, *expected[:2]] and source.classes == ("0", "1", "2", "3")
    sidecar = tmp_path / "a.tar.labels"
    written = sidecar.read_bytes()
    assert sets(several_labels(open_source(tmp_path))) == sets(source) and sidecar.read_bytes() == written
    for damage in (b"", b"{}\n", written[:-8], written.replace(b'"samples": 6', b'"samples": 5'), b"\xff" * 50):
        sidecar.write_bytes(damage)
        assert sets(several_labels(open_source(tmp_path))) == sets(source)
    (tmp_path / "about.json").write_text(json.dumps({"classes": list("wxyz")}))
    assert several_labels(open_source(tmp_path)).classes == tuple("wxyz")


def save(folder: Path, labels: list, kind) -> Path:
    rows = {"image": [{"bytes": jpeg(number), "path": None} for number in range(len(labels))], "labels": labels}
    features = datasets.Features({"image": datasets.Image(), "labels": kind})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder)
    return folder


def test_data_sets(tmp_path: Path):
    named = datasets.List(datasets.ClassLabel(names=["cat", "dog", "owl"]))
    source = several_labels(open_source(save(tmp_path / "a", [[2, 0], [], None, [1]], named)))
    assert sets(source) == [(0, 2), (), (), (1,)] and source.classes == ("cat", "dog", "owl")
    assert sets(pickle.loads(pickle.dumps(source))) == sets(source)
    whole = several_labels(open_source(save(tmp_path / "b", [[2, 0], [1]], datasets.List(datasets.Value("int32")))))
    assert sets(whole) == [(0, 2), (1,)] and whole.classes == ("0", "1", "2")
    assert open_source(tmp_path / "a").label_array() is None
    whole = save(tmp_path / "c", [[0, -1]], datasets.List(datasets.Value("int64")))
    with pytest.raises(DataError, match="column labels holds a label that is null or negative; number from 0 on"):
        several_labels(open_source(whole))
    with pytest.raises(DataError, match="has no column of lists of class labels; write one that is called labels"):
        several_labels(open_source(save(tmp_path / "one", [1, 0], datasets.ClassLabel(names=["cat", "dog"]))))


def test_other_labels_are_other_data(tmp_path: Path):
    prints = []
    for cells in (["0;1", "1"], ["0", "0;1"], ["0;1", "1"]):
        prints.append(several_labels(open_source(write_list(tmp_path, cells))).fingerprint)
    assert prints[0] == prints[2] != prints[1]


def test_single_labels_do_not_notice(tmp_path: Path):
    """The index, its fingerprint and its labels are those of a shard that says the same in another way."""
    one = open_source(write_tar(tmp_path / "a.tar", [{"cls": b"1"}, {"cls": b"0"}]))
    assert one.label_array().tolist() == [1, 0] and [raw.label for raw in one.read([0, 1])] == [1, 0]
    assert not (tmp_path / "a.tar.labels").exists()
    mixed = open_source(write_tar(tmp_path / "b.tar", [{"cls": b"1 2"}, {"cls": b"0"}]))
    assert mixed.label_array() is None and mixed.num_unlabelled == 1  # two are not one


def test_batches_hold_them_hot(tmp_path: Path):
    source = several_labels(open_source(write_list(tmp_path, ["0;3", "", "1"])))
    view = View(size=(8, 8))
    batch = evaluation_samples(source, DataConfig(), [view], channels=3, labels=True).__getitems__([2, 0, 1])
    wanted = torch.zeros(3, 4, dtype=torch.bool)
    wanted[0, 1] = wanted[1, 0] = wanted[1, 3] = True
    assert torch.equal(batch.labels, wanted)
    assert batch.labels.dtype == torch.bool


def test_another_s_numbers_by_name(tmp_path: Path):
    (tmp_path / "test").mkdir()
    train = several_labels(open_source(write_list(tmp_path, ["cat;dog", "bird"])))
    test = several_labels(open_source(write_list(tmp_path / "test", ["dog", "cat;dog", ""])))
    assert test.classes == ("cat", "dog")
    joined = several_like(test, train)
    assert sets(joined) == [(2,), (1, 2), ()] and joined.classes == train.classes and joined.num_classes == 3
    with pytest.raises(DataError, match=r"1 classes are not among those of .*list.csv: bird; correct one"):
        several_like(train, test)
    assert several_like(train, train) is train


def test_merged_and_dropped(tmp_path: Path):
    source = several_labels(open_source(write_list(tmp_path, ["cat;dog;fox", "fox", "dog", ""])))
    found = renumbered(source, [0, 0, -1], ("pet",))
    assert sets(found) == [(0,), (), (0,), ()] and found.counts().tolist() == [2]


@pytest.mark.parametrize("seed", range(3))
def test_any_sets_by_a_slow_oracle(tmp_path: Path, seed: int):
    rng = np.random.default_rng(seed)
    wanted = [tuple(sorted({int(each) for each in rng.integers(0, 6, rng.integers(0, 5))})) for _ in range(30)] + [(5,)]
    source = several_labels(open_source(write_list(tmp_path, [";".join(map(str, each[::-1])) for each in wanted])))
    assert sets(source) == wanted
    numbers = rng.integers(-1, 3, 6)
    mapped = [tuple(sorted({int(numbers[each]) for each in own if numbers[each] >= 0})) for own in wanted]
    assert sets(renumbered(source, numbers, ("a", "b", "c"))) == mapped


def refused(tmp_path: Path, case: str) -> None:
    if case == "a folder":
        (tmp_path / "cat").mkdir()
        (tmp_path / "cat/1.jpg").write_bytes(jpeg(1))
        several_labels(open_source(tmp_path))
    samples = {"a sample without": [{"cls": b"1"}, {}], "words": [{"json": b'{"labels": ["cat"]}'}]}
    if case in samples:
        several_labels(open_source(write_tar(tmp_path / "a.tar", samples[case])))
    cells = {"no column": ["1"], "none at all": ["", ""], "a stray number": ["0;70000", "1"]}[case]
    several_labels(open_source(write_list(tmp_path, cells, column="other" if case == "no column" else "label")))


REFUSED = {
    "a folder": "labels=several reads file lists, local tar shards and data sets of kind=hub; write one of these",
    "a sample without": r"a\.tar: sample '001' has no list of labels; write a \.cls of numbers",
    "words": "sample '000' has no list of labels",
    "no column": "has no column of labels; add one that is called label or class",
    "none at all": "no sample has a label; write them, as cat;dog",
    "a stray number": "has 3 different labels, and one is 70,000; number classes from 0 on",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_says_no_labels(tmp_path: Path, case: str):
    with pytest.raises(DataError, match=REFUSED[case]) as error:
        refused(tmp_path, case)
    assert "\n" not in str(error.value)
