"""Every source keeps one contract; what is missing or not understood is named with what was found."""

import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitssl.data import sources
from vitssl.data.sources import FolderSource, ShardSource, Source, Subset, find_shards, label_like, open_source
from vitssl.errors import ConfigError, DataError


def check_contract(source: Source) -> None:
    """What holds of every source."""
    num = source.num_samples
    assert source.name and source.chunks.dtype == np.int64 and source.chunks.min() >= 1 and source.chunks.sum() == num
    everything = source.read(range(num))
    assert len({raw.key for raw in everything}) == num and all(raw.image and raw.where for raw in everything)
    some = np.random.default_rng(0).integers(0, num, 2 * num)
    assert source.read(some) == [everything[each] for each in some]
    assert source.read([]) == []
    labels = source.label_array()
    assert (labels is not None) == source.labels
    if labels is not None:
        assert labels.dtype == np.int64 and labels.tolist() == [raw.label for raw in everything]
    packed = pickle.dumps(source)
    assert len(packed) < 4000
    assert pickle.loads(packed).read(some) == source.read(some)


@pytest.mark.parametrize("kind", ["shards", "folder", "list", "parquet", "hub", "subset", "renumbered"])
def test_contract(
    kind: str, shards: Path, photos: Path, classes: Callable, listing: Callable, parquet: Callable, saved: Callable
) -> None:
    source = {
        "list": lambda: open_source(listing()),
        "parquet": lambda: open_source([parquet("a/p.parquet"), parquet("b/p.parquet", num=7, first=24)]),
        "hub": lambda: open_source(saved()),
        "folder": lambda: open_source(photos),
        "shards": lambda: open_source(shards),
        "subset": lambda: Subset(open_source(shards), [99, 3, 40, 41]),
        "renumbered": lambda: label_like(classes("b", "d"), classes("a", "b", "c", "d")),
    }[kind]()
    check_contract(source)
    assert source.ignored == (2 if kind == "folder" else 0)


@pytest.mark.parametrize("kind", ["folder", "list", "parquet", "hub"])
def test_images_beyond_all_measure(
    kind: str, photos: Path, listing: Callable, parquet: Callable, saved: Callable, encoded: Callable, monkeypatch
) -> None:
    monkeypatch.setattr(sources.base, "MAX_BYTES", len(encoded(1)) - 1)
    source = open_source({"folder": lambda: photos, "list": listing, "parquet": parquet, "hub": saved}[kind]())
    raw = source.read([1 if kind in ("parquet", "hub") else 0])[0]
    assert not raw.image and not raw.passing
    assert raw.problem == f"{raw.where}: has {len(encoded(1)):,} bytes, more than {len(encoded(1)) - 1:,}; take it out"


def test_a_fingerprint_is_of_the_samples_and_their_order(shards: Path, photos: Path, tmp_path: Path, encoded: Callable) -> None:
    source, again = open_source(shards), open_source(shards)
    shutil.copytree(shards, tmp_path / "moved")
    assert source.fingerprint == again.fingerprint == open_source(tmp_path / "moved").fingerprint
    names = sorted(map(str, shards.glob("*.tar")))
    others = [
        open_source(names[:-1]),
        open_source(names[::-1]),
        Subset(source, [1, 2]),
        Subset(source, [2, 1]),
        open_source(photos),
    ]
    (photos / "cat/5.png").write_bytes(encoded(5))
    others.append(open_source(photos))
    assert len({source.fingerprint, *(other.fingerprint for other in others)}) == 7


def test_tars_beside_images_are_not_guessed_about(photos: Path, write_tar: Callable, encoded: Callable) -> None:
    write_tar(photos / "backup.tar", {"0.png": encoded(0)})
    with pytest.raises(ConfigError, match=r"photos: holds tar shards and images; say which are meant with kind=shards or kind"):
        open_source(photos)
    assert open_source(photos, kind="folder").num_samples == 6 and open_source(photos, kind="shards").num_samples == 1


def test_home_and_sidecars(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    num = open_source(shards).num_samples
    assert open_source("~/shards").num_samples == num == open_source(["~/shards/*.tar"]).num_samples
    assert list((tmp_path / "shards").glob("*.index"))
    assert open_source("~/shards/*").num_samples == num  # the sidecars match too, and are none


def test_shards_give_the_bytes_and_labels_that_were_written(shards: Path, encoded: Callable, label_of: Callable) -> None:
    source = ShardSource(str(shards))
    raws = source.read([0, 39, 40, 99])
    assert [raw.key for raw in raws] == ["train-000.tar/0000", "train-000.tar/0039", "train-001.tar/0040", "train-002.tar/0099"]
    assert [raw.image for raw in raws] == [encoded(number) for number in (0, 39, 40, 99)]
    assert [raw.label for raw in raws] == [label_of(number) for number in (0, 39, 40, 99)]
    assert raws[2].where.startswith(f"{shards}/train-001.tar: 0040.png (byte ")


def test_chunks_never_span_shards(shards: Path) -> None:
    source = ShardSource(str(shards))
    assert set(np.cumsum(source.chunks)) >= {40, 63, 100}
    assert source.chunks.tolist() == [13, 13, 14, 11, 12, 12, 12, 13]


def test_shards_read_more_files_than_are_kept_open(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.shards, "_OPEN", 1)
    source = ShardSource(str(shards))
    keys = [raw.key.rpartition("/")[2] for raw in source.read([0, 50, 99, 1, 51])]
    assert keys == ["0000", "0050", "0099", "0001", "0051"]
    assert len(source._files) == 1


@pytest.mark.parametrize(
    "path",
    ["{}", "{}/train-{{000..002}}.tar", "{}/*.tar", "{}/train-00[0-2].tar", "{}/train-00{{0,1}}.tar::{}/train-002.tar",
     ["{}/train-000.tar", "{}/train-{{001..002}}.tar"], ["{}"]],
)  # fmt: skip
def test_every_way_to_name_shards(shards: Path, path: str | list[str]) -> None:
    named = path.format(shards, shards) if isinstance(path, str) else [each.format(shards) for each in path]
    assert find_shards(named) == [str(shards / f"train-{number:03d}.tar") for number in range(3)]


def test_a_path_that_exists_is_no_pattern(tmp_path: Path, write_tar: Callable, encoded: Callable) -> None:
    folder = tmp_path / "a[1]{2}"
    folder.mkdir()
    write_tar(folder / "s.tar", {"a.png": encoded(0)})
    assert open_source(folder).num_samples == 1


MISSING = {
    "a range": ("{}/train-{{000..004}}.tar", r"2 of 5 shards are missing, the first is .*train-003\.tar; .* 3 tar shards, "),
    "a glob": ("{}/test-*.tar", r"tar: nothing is there; .* holds 3 tar shards, train-000\.tar to train-002\.tar: correct"),
    "a file": ("{}/x.tar", r"x\.tar: nothing is there"),
    "a folder": ("{}/none/x-{{0..1}}.tar", r"2 of 2 shards are missing, the first is .*; .*none is not a folder"),
    "a list": (["{}/train-000.tar", "{}/no.tar"], r"no\.tar: nothing is there"),
}


@pytest.mark.parametrize("kind", MISSING)
def test_missing_shards_are_named_with_what_was_found(shards: Path, kind: str) -> None:
    path, message = MISSING[kind]
    named = path.format(shards) if isinstance(path, str) else [each.format(shards) for each in path]
    with pytest.raises(DataError, match=message) as error:
        open_source(named)
    assert "\n" not in str(error.value)


def test_patterns_that_do_not_expand(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"braces do not match"):
        open_source(str(tmp_path / "s-{000..0"))
    with pytest.raises(ConfigError, match=r"is empty"):
        open_source([])
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds no tar shards \(holds 1 files and no tar\)"):
        open_source(tmp_path, kind="shards")


def test_a_shard_that_changes_under_a_run_is_named(shards: Path) -> None:
    source = ShardSource(str(shards))
    (shards / "train-001.tar").write_bytes(b"short")
    (raw,) = source.read([40])
    assert re.search(r"train-001\.tar: 0040\.png \(byte .*\): the shard ends before this image does", raw.problem)
    (shards / "train-002.tar").unlink()
    (raw,) = source.read([99])
    assert re.search(r"train-002\.tar: 0099\.png .* cannot be read \(No such file", raw.problem) and raw.passing


def test_folder_is_sorted_labelled_and_counts_what_it_leaves(photos: Path) -> None:
    source = FolderSource(photos)
    keys = [raw.key for raw in source.read(range(source.num_samples))]
    assert keys == ["cat/1.png", "cat/deep/2.jpg", "dog/10.webp", "dog/3.PNG", "dog/9.bmp", "dog/z.tiff"]
    assert source.classes == ("cat", "dog") and source.label_array().tolist() == [0, 0, 1, 1, 1, 1]
    assert source.ignored == 2
    (photos / "0.png").write_bytes(b"x")
    loose = FolderSource(photos)
    assert loose.num_samples == 7 and not loose.labels and loose.classes is None and loose.read([0])[0].label is None


def test_folder_follows_links_once(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "more" / "linked.png")
    (photos / "zebra").symlink_to(tmp_path / "more")
    (photos / "zebra" / "loop").symlink_to(photos)
    source = FolderSource(photos)
    assert source.num_samples == 7 and source.classes == ("cat", "dog", "zebra")


def test_folder_errors(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds no image \(1 other files\); images end in \.jpg, "):
        open_source(tmp_path / "empty")
    with pytest.raises(DataError, match=r"is not a folder; correct the path"):
        open_source(tmp_path / "none", kind="folder")
    source = FolderSource(photos)
    (photos / "cat" / "1.png").unlink()
    (raw,) = source.read([0])
    assert re.search(r"cat/1\.png: cannot be read \(No such file", raw.problem) and not raw.image


def test_split_picks_shards_or_a_sub_folder(shards: Path, photos: Path, write_tar: Callable, encoded: Callable) -> None:
    write_tar(shards / "test-000.tar", {"t.png": encoded(0)})
    assert open_source(shards).num_samples == 101
    assert open_source(shards, split="train").num_samples == 100
    assert open_source(shards, split="test").read([0])[0].key == "test-000.tar/t"
    assert open_source(photos, split="cat").num_samples == 2
    with pytest.raises(DataError, match=r"no folder 'val' and no shards val-\*\.tar or val-\*\.parquet \(it holds test-"):
        open_source(shards, split="val")
    with pytest.raises(ConfigError, match=r"split 'test' is looked up in a folder"):
        open_source(f"{shards}/*.tar", split="test")


def test_demo_is_rendered_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: Path) -> None:
    rendered = []
    monkeypatch.setattr(sources.demo, "render", lambda folder, *, progress: rendered.append((folder, progress)))
    assert open_source(shards, kind="demo").num_samples == 100
    assert rendered == [(shards, None)]
    with pytest.raises(DataError, match=r"no shards test-"):
        open_source(shards, kind="demo", split="test")
    with pytest.raises(ConfigError, match=r"kind=demo opens one path, and there are 1; name one"):
        open_source([str(shards)], kind="demo")


def test_class_names_come_from_about_json(shards: Path) -> None:
    assert ShardSource(str(shards)).classes is None
    (shards / "about.json").write_text('{"classes": ["a", "b", "c", "d"]}')
    assert ShardSource(str(shards)).classes == ("a", "b", "c", "d")
    (shards / "about.json").write_text("[1")
    assert ShardSource(str(shards)).classes is None
    (shards / "about.json").write_text('{"classes": ["a", "b"]}')
    with pytest.raises(DataError, match=r"about.json: names 2 classes, and there is a label 3; correct it or remove it"):
        ShardSource(str(shards))


def test_shards_of_one_name_in_two_folders_have_keys_of_their_own(
    tmp_path: Path, write_tar: Callable, encoded: Callable
) -> None:
    for folder in ("x", "y/z"):
        (tmp_path / folder).mkdir(parents=True)
        write_tar(tmp_path / folder / "000.tar", {"1.png": encoded(len(folder))})
    source = open_source([str(tmp_path / "x/000.tar"), str(tmp_path / "y/z/000.tar")])
    assert [raw.key for raw in source.read([0, 1])] == ["x/000.tar/1", "y/z/000.tar/1"]
    assert open_source(tmp_path / "x").read([0])[0].key == "000.tar/1"


def test_a_file_that_might_never_end_is_not_opened(photos: Path) -> None:
    source = FolderSource(photos)
    (photos / "cat/1.png").unlink()
    os.mkfifo(photos / "cat/1.png")
    assert "is no file" in source.read([0])[0].problem


def test_descriptors_do_not_run_out(tmp_path: Path, write_tar: Callable, encoded: Callable) -> None:
    shards = [write_tar(tmp_path / f"{number:03}.tar", {"1.png": encoded(number)}) for number in range(300)]
    source = open_source(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    assert all(raw.image for raw in source.read(range(300)))
    assert len(os.listdir("/proc/self/fd")) - before <= 128 + 128 + 2
    for path in tmp_path.glob("*.manifest"):
        path.unlink()
    before = len(os.listdir("/proc/self/fd"))
    assert len(open_source(shards).manifest.rows) == 300 and len(os.listdir("/proc/self/fd")) - before <= 2
