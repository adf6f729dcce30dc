"""Parquet files: row groups as chunks, read when needed and kept within limits; columns, labels, and refusals."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vitssl.data.sources import open_source
from vitssl.data.sources.base import Ahead
from vitssl.errors import ConfigError, DataError

pa = pytest.importorskip("pyarrow", reason="the extra vitssl[hub] is not installed here")
pq = pytest.importorskip("pyarrow.parquet", reason="the extra vitssl[hub] is not installed here")


@pytest.fixture
def write(tmp_path: Path, encoded: Callable) -> Callable[..., str]:
    """``write(name, images=..., **columns)``: a parquet file of these columns, by default four pictures; ``groups`` of rows."""

    def make(name: str = "t.parquet", *, groups: int = 3, statistics: bool = True, **columns: list) -> str:
        columns = {"image": [encoded(number) for number in range(4)], **columns}
        table = pa.table({key: values for key, values in columns.items() if values is not None})
        pq.write_table(table, tmp_path / name, row_group_size=groups, write_statistics=statistics)
        return str(tmp_path / name)

    return make


def test_row_groups_are_chunks(parquet: Callable, tmp_path: Path, encoded: Callable, label_of: Callable) -> None:
    parquet("d/train-0.parquet"), parquet("d/train-1.parquet", num=7, first=24), parquet("d/test-0.parquet", num=3, first=31)
    source = open_source(tmp_path / "d", split="train")
    assert source.chunks.tolist() == [10, 10, 4, 7] and source.by_chunk and source.classes == ("a", "b", "c", "d")
    raws = source.read([30, 0, 24, 23])
    assert [raw.image for raw in raws] == [encoded(number) for number in (30, 0, 24, 23)]
    assert [raw.key for raw in raws] == ["train-1.parquet/6", "train-0.parquet/0", "train-1.parquet/0", "train-0.parquet/23"]
    assert raws[0].where == f"{tmp_path}/d/train-1.parquet: row 6"
    assert source.label_array().tolist() == [label_of(number) for number in range(31)]
    assert abs(source.mean_bytes - len(encoded(0))) < 100


def test_only_what_is_needed_is_read(parquet: Callable) -> None:
    source = open_source(parquet())
    source.label_array()
    assert source._buffer.fetched == 0
    source.read([0, 9, 5])
    assert source._buffer.fetched == 1
    source.read([0, 12], Ahead(np.array([21]), 1 << 20))
    source.read([23])
    assert source._buffer.fetched == 3
    for _ in range(2):  # where nothing more fits than what is being read
        source.read([0, 12, 1, 13, 23], Ahead(np.array([], dtype=np.int64), 1))
    assert source._buffer.fetched <= 9 and len(source._buffer._entries) == 1


@pytest.mark.parametrize(
    "path",
    ["{}/d", "{}/d/*.parquet", "{}/d/{{a,b}}.parquet",
     ["{}/d/a.parquet", "{}/d/b.parquet"], ["{}/d"]],
)  # fmt: skip
def test_every_way_to_name_them(parquet: Callable, tmp_path: Path, path: str | list[str]) -> None:
    parquet("d/a.parquet", num=3), parquet("d/b.parquet", num=4, first=3)
    (tmp_path / "d/README.md").write_text("x")
    named = path.format(tmp_path) if isinstance(path, str) else [each.format(tmp_path) for each in path]
    kind = "parquet" if path == ["{}/d"] else "auto"
    told = []
    assert open_source(named, kind=kind, progress=lambda *numbers: told.append(numbers)).num_samples == 7
    assert told == [(1, 2), (2, 2)]


def test_tars_with_tables_beside_them_are_shards_and_images_are_asked_about(
    shards: Path, photos: Path, write: Callable
) -> None:
    os.rename(write(), shards / "000.parquet")
    assert open_source(shards).num_samples == 100 and open_source(shards, kind="parquet").num_samples == 4
    os.rename(write(), photos / "meta.parquet")
    with pytest.raises(ConfigError, match=r"photos: holds parquet files and images; say which .* kind=parquet or kind=f"):
        open_source(photos)


@pytest.mark.parametrize("statistics", [True, False])
def test_labels_are_known_from_the_footers(write: Callable, statistics: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(write(label=[5, 0, 2, 3], statistics=statistics))
    assert source.label_array().tolist() == [5, 0, 2, 3] and source.classes is None
    for values in ([5, None, 2, 3], [5, -1, 2, 3]):
        source = open_source(write(labels=values, statistics=statistics))
        assert source.num_unlabelled == 1 and source.label_array() is None
        assert [raw.label for raw in source.read(range(4))] == [5, None, 2, 3]
    assert open_source(write(statistics=statistics)).num_unlabelled == 4
    path = write(label=[5, 0, 2, 3])
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", None)
    assert open_source(path).labels


def test_images_in_plain_columns(write: Callable, encoded: Callable) -> None:
    pictures = [encoded(number) for number in range(4)]
    assert open_source(write(image=None, content=pictures)).read([3])[0].image == encoded(3)
    assert open_source(write(image=None, JPG=pictures, hash=[b"x"] * 4)).read([3])[0].image == encoded(3)
    structs = [{"bytes": picture, "path": "/x.png", "more": 1} for picture in pictures]
    assert open_source(write(image=structs)).read([3])[0].image == encoded(3)
    large = pa.array(pictures, pa.large_binary())
    assert open_source(write(image=large)).read([3])[0].image == encoded(3)
    with pytest.raises(DataError, match=r"2 columns hold images \(jpg, png\); keep one of them"):
        open_source(write(image=None, jpg=pictures, png=pictures, x=pictures))
    with pytest.raises(DataError, match=r"no column holds images as bytes \(columns: a, b\)"):
        open_source(write(image=None, a=[1], b=["x"]))


def test_an_image_that_is_only_named_is_not_looked_for(write: Callable, photos: Path, encoded: Callable) -> None:
    secret = str(photos / "cat/1.png")
    source = open_source(write(image=[{"bytes": None, "path": secret}, {"bytes": encoded(0), "path": None}, None]))
    named, held, empty = source.read([0, 1, 2])
    assert named.problem == f"{named.where}: names {secret} and does not hold it; write images into the file"
    assert not named.image and not named.passing and held.image and not empty.image and not empty.problem


def test_files_that_do_not_fit(write: Callable, parquet: Callable, tmp_path: Path) -> None:
    other = write("o.parquet", label=[1, 2, 3, 4])
    message = r"o\.parquet: its columns \(image image, label label\) are not those of .*p\.parquet \(.*label of 4 classes\)"
    with pytest.raises(DataError, match=message):
        open_source([parquet(), other])
    with pytest.raises(DataError, match=r"n\.parquet: has no rows; correct the path"):
        open_source(write("n.parquet", image=pa.array([], pa.binary())))
    table = pq.read_table(parquet())
    label = table.schema.get_field_index("label")
    pq.write_table(table.set_column(label, table.schema.field(label), pa.array([9] * 24)), tmp_path / "l.parquet")
    with pytest.raises(DataError, match=r"l\.parquet: names 4 classes, and there is a label 9; correct "):
        open_source(tmp_path / "l.parquet")


def test_files_that_are_missing_or_damaged(parquet: Callable, tmp_path: Path) -> None:
    path = parquet()
    with pytest.raises(DataError, match=r"x\.parquet: nothing is there; .* holds 1 parquet files, p\.parquet to "):
        open_source(tmp_path / "x.parquet")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"this folder holds no parquet files \(holds 0 files and no parquet file\)"):
        open_source(tmp_path / "none", kind="parquet")
    with pytest.raises(DataError, match=r"has no folder 'val' and no shards val-\*\.parquet \(it holds "):
        open_source(tmp_path, split="val", kind="parquet")
    whole = Path(path).read_bytes()
    for content in (b"", b"x" * 99, whole[: len(whole) // 2], whole[:-50] + whole[-8:]):
        Path(path).write_bytes(content)
        with pytest.raises(
            DataError, match=r"p\.parquet: (is damaged, changed, or no parquet file|cannot be read) \(.*\); "
        ) as error:
            open_source(path)
        assert "\n" not in str(error.value)


def test_a_file_that_changes_under_a_run_is_named(parquet: Callable, write: Callable) -> None:
    for change, passing in (
        (lambda path: os.unlink(path), True),
        (lambda path: Path(path).write_bytes(b"short"), False),
        (lambda path: os.replace(write(), path), False),
        (lambda path: parquet(num=23), False),
    ):
        source = open_source(path := parquet())
        change(path)
        (raw,) = source.read([23])
        assert raw.problem.startswith(f"{path}: ") and raw.passing == passing and raw.key == "p.parquet/23"
    with pytest.raises(DataError, match=r"p\.parquet: rows or labels are not what the footers say; write the files again"):
        source.label_array()


def test_bytes_that_are_damaged_are_a_problem_of_their_rows(parquet: Callable) -> None:
    source = open_source(path := parquet())
    content = bytearray(Path(path).read_bytes())
    content[4:4000] = os.urandom(3996)
    Path(path).write_bytes(content)
    raws = source.read([0, 23])
    assert raws[0].problem and not raws[0].passing and raws[1].image


def test_fingerprint_is_of_the_files_in_their_order(parquet: Callable, tmp_path: Path) -> None:
    names = [parquet("a.parquet", num=3), parquet("b.parquet", num=3, first=3)]
    found = {open_source(each).fingerprint for each in (names, names[::-1], names[:1], names[1:])}
    os.renames(names[0], tmp_path / "moved/c.parquet")
    assert len(found) == 4 and open_source(tmp_path / "moved").fingerprint in found
