"""File lists: the three forms, labels by number and by name, and what is wrong with one in a line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vitssl.data.sources import open_source
from vitssl.errors import ConfigError, DataError

FORMS = {
    "text": ("a.txt", "# mine\ncat/1.png\n\n  dog/3.PNG \r\ncat/deep/2.jpg\n", None),
    "commas": ("a.csv", "path,label\ncat/1.png,4\ndog/3.PNG,0\ncat/deep/2.jpg,4\n", [4, 0, 4]),
    "tabs": ("a.tsv", "class\tsize\tfilename\n4\t9\tcat/1.png\n0\t\tdog/3.PNG\n\n04\t1\tcat/deep/2.jpg\n", [4, 0, 4]),
    "excel": ("a.CSV", '\ufeffImage , Label\r\n"cat/1.png", 4\r\ndog/3.PNG,0\r\ncat/deep/2.jpg,4\r\n', [4, 0, 4]),
    "no labels": ("a.csv", "file_name,caption\ncat/1.png,x\ndog/3.PNG,y\ncat/deep/2.jpg,\n", None),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_list(form: str, listing: Callable, photos: Path) -> None:
    name, text, labels = FORMS[form]
    source = open_source(listing(text, name))
    raws = source.read([0, 1, 2])
    assert [raw.key for raw in raws] == ["cat/1.png", "dog/3.PNG", "cat/deep/2.jpg"]
    assert [raw.image for raw in raws] == [(photos / raw.key).read_bytes() for raw in raws]
    assert raws[1].where == str(photos / "dog/3.PNG")
    found = source.label_array()
    assert (found if found is None else found.tolist()) == labels and source.classes is None
    assert source.num_unlabelled == (0 if labels else 3)


def test_names_are_classes_and_one_empty_cell_means_no_labels(listing: Callable) -> None:
    source = open_source(listing("path,label\ncat/1.png,-1\ndog/3.PNG,zoo\ndog/9.bmp,10\ndog/9.bmp,-1\n"))
    assert source.classes == ("-1", "10", "zoo") and source.label_array().tolist() == [0, 2, 1, 0]
    source = open_source(listing("path,label\ncat/1.png,cat\ndog/3.PNG, \n"))
    assert not source.labels and source.classes is None and source.num_unlabelled == 1
    assert [raw.label for raw in source.read([0, 1])] == [None, None]


def test_paths_are_of_the_lists_folder_or_absolute(
    listing: Callable, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    listing(f"cat/1.png\n{photos}/dog/3.PNG\n", "a.txt")
    assert all(raw.image for raw in open_source("a.txt").read([0, 1]))
    (tmp_path / "b.lst").write_text("photos/cat/1.png\n")
    with pytest.raises(ConfigError, match=r"b\.lst: a list of images ends in \.txt, \.csv, \.tsv; rename it"):
        open_source(tmp_path / "b.lst", kind="list")


def test_a_name_that_is_no_text_is_kept(listing: Callable, photos: Path, encoded: Callable) -> None:
    (photos / b"\xff.png".decode(errors="surrogateescape")).write_bytes(encoded(8))
    source = open_source(listing(b"\xff.png\ncat/1.png\n", "a.txt"))
    assert source.read([0])[0].image == encoded(8) and source.fingerprint


def test_fingerprint_is_of_paths_and_labels(listing: Callable) -> None:
    texts = ["path,label\ncat/1.png,1\n", "path,label\ncat/1.png,2\n", "path,label\ncat/deep/2.jpg,1\n", "path\ncat/1.png\n"]
    found = [open_source(listing(text)).fingerprint for text in texts]
    assert len(set(found)) == 4 and open_source(listing(texts[0], "other.csv")).fingerprint == found[0]


def test_an_image_that_is_gone_is_told_when_it_is_read(listing: Callable, photos: Path) -> None:
    source = open_source(listing())
    (photos / "dog/9.bmp").unlink()
    (raw,) = source.read([4])
    assert raw.label == 1 and not raw.image and raw.passing
    assert raw.problem.endswith("dog/9.bmp: cannot be read (No such file or directory); put it back and start again")


WRONG = {
    "no header": ("cat/1.png,0\ndog/3.PNG,1\n", r"its first line \(cat/1\.png, 0\) is no header; begin with one .* path"),
    "nothing": ("", r"its first line \(\) is no header"),
    "only a header": ("path,label\n", r"lists no image; write one path a line"),
    "a comma": ("path,label\ncat/1.png,0\ndog/1,2.png,1\n", r"line 3 has 3 cells and the header 2; correct it, and quote"),
    "no path": ("path,label\ncat/1.png,0\n,1\n", r"line 3 names no image; correct it or take it out"),
    "a quote": (f'path,label\n"cat/1.png,0\n{"x" * 140_000}', r"is no table \(field larger than .*\); look for a quote"),
    "zeros": ("path\ncat/1\0.png\n", r"holds zero bytes, so it is no text in UTF-8; save it as that"),
    "elsewhere": ("path\n1.png\n", r"its first image, /.*/photos/1\.png, is not there; paths begin at / or in the list's "),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_with_a_list(kind: str, listing: Callable) -> None:
    text, message = WRONG[kind]
    with pytest.raises(DataError, match=rf"photos/list\.csv: {message}") as error:
        open_source(listing(text))
    assert "\n" not in str(error.value)


def test_a_list_that_is_not_there_and_two_of_them(listing: Callable, photos: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv: cannot be read \(No such file or directory\); correct the path"):
        open_source(photos / "none.csv", kind="list")
    with pytest.raises(
        ConfigError, match=r"kind=list opens one path, and there are 2; name one, or mix them with data\.sources"
    ):
        open_source([listing(), listing()], kind="list")
    with pytest.raises(ConfigError, match=r"split 'train' is looked up in a folder"):
        open_source(listing(), split="train")
