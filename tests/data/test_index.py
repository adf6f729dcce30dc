"""The sidecar index: right offsets, rebuilt when the shard changed, and damage named with shard, place and remedy."""

import gzip
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vitssl.data import index, tarscan
from vitssl.data.index import build_index, load_index
from vitssl.data.manifest import index_shards
from vitssl.errors import DataError


def test_records_point_at_the_images(tmp_path: Path, write_tar: Callable, encoded: Callable) -> None:
    long = "a/" + "k" * 150  # longer than a plain tar header holds
    members = {
        "b/x.y.jpg": b"the extension is y.jpg, so this is no image of the convention",
        "b/x.JPG": encoded(1),
        "b/x.cls": b" 7\n",
        f"{long}.jpeg": encoded(2),
        f"{long}.json": json.dumps({"cls": 3, "caption": "hm"}).encode(),
        "ünlabelled.webp": encoded(3),
        "named.png": encoded(4),
        "named.json": b'{"label": "cat"}',
    }
    shard = write_tar(tmp_path / "s.tar", members)
    found = build_index(shard)
    content = Path(shard).read_bytes()
    assert found.num_samples == 4 and found.num_unlabelled == 2 and found.ignored == 0
    rows = [row.tolist() for row in found.records]
    assert [row[0].decode() for row in rows] == ["b/x", long, "ünlabelled", "named"]
    assert [content[row[1] : row[1] + row[2]] for row in rows] == [encoded(number) for number in (1, 2, 3, 4)]
    assert [row[3] for row in rows] == [7, 3, index.NO_LABEL, index.NO_LABEL]
    assert [row[4].decode() for row in rows] == ["JPG", "jpeg", "webp", "png"]


def test_members_of_a_sample_need_not_be_neighbours(tmp_path: Path, write_tar: Callable) -> None:
    shard = write_tar(tmp_path / "s.tar", {"a.png": b"A", "b.png": b"B", "b.cls": b"1", "a.cls": b"0"})
    assert build_index(shard).records["label"].tolist() == [0, 1]


def test_only_regular_files_count_and_the_rest_is_counted(tmp_path: Path, write_tar: Callable) -> None:
    shard = write_tar(tmp_path / "s.tar", {"a.png": b"A", "README": b"hm", ".hidden.png": b"hm", "__index__.json": b"{}"})
    with tarfile.open(shard, "a") as tar:
        for name, kind in {
            "l.png": tarfile.SYMTYPE,
            "h.png": tarfile.LNKTYPE,
            "d.png": tarfile.CHRTYPE,
            "f": tarfile.DIRTYPE,
        }.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    found = build_index(shard)
    assert found.records["key"].tolist() == [b"a"]
    assert found.ignored == 6  # a folder is no member of anything


def test_sidecar_is_read_back_and_rebuilt_when_the_shard_changes(tmp_path: Path, write_tar: Callable) -> None:
    shard = write_tar(tmp_path / "s.tar", {"a.png": b"A", "b.png": b"B"})
    assert load_index(shard) is None
    built = build_index(shard)
    assert built.sidecar == f"{shard}.index" and not list(tmp_path.glob("*.tmp"))
    loaded = load_index(shard)
    assert loaded.identity == built.identity and np.array_equal(loaded.records, built.records)
    write_tar(tmp_path / "s.tar", {"a.png": b"A", "c.png": b"C"})  # as long as before
    assert load_index(shard) is None
    assert index_shards([shard]).open(0).records["key"].tolist() == [b"a", b"c"]


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"", lambda data: b"{}\n", lambda data: b"[]\n" + data,
     lambda data: data.replace(b'"version": 1', b'"version": 0'), lambda data: b"\x80\x04N."],
)  # fmt: skip
def test_a_damaged_or_foreign_sidecar_is_rebuilt(tmp_path: Path, write_tar: Callable, damage: Callable) -> None:
    shard = write_tar(tmp_path / "s.tar", {"a.png": b"A"})
    sidecar = Path(build_index(shard).sidecar)
    good = sidecar.read_bytes()
    sidecar.write_bytes(damage(good))
    assert load_index(shard) is None
    assert index_shards([shard]).rows["samples"].tolist() == [1]
    assert sidecar.read_bytes() == good


def test_cache_is_used_where_the_folder_is_not_writable(tmp_path: Path, write_tar: Callable, cache: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", {"a.png": b"A"})
    Path(f"{shard}.index").mkdir()  # stands for a folder without permission, which does not stop the super-user
    built = build_index(shard)
    assert Path(built.sidecar).parent == cache / "index"
    assert load_index(shard).sidecar == built.sidecar


def test_without_any_place_for_a_sidecar_the_index_stays_in_memory(
    tmp_path: Path, write_tar: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_tar(tmp_path / "s.tar", {"a.png": b"A"})
    Path(f"{shard}.index").mkdir()
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("VITSSL_CACHE", str(tmp_path / "file" / "cache"))
    built = build_index(shard)
    assert built.sidecar is None
    assert pickle.loads(pickle.dumps(built)).records["key"].tolist() == [b"a"]


def test_pickle_is_small_and_reads_the_sidecar_again(tmp_path: Path, write_tar: Callable) -> None:
    shard = write_tar(tmp_path / "s.tar", {f"{number:05d}.png": b"" for number in range(2000)})
    built = build_index(shard)
    packed = pickle.dumps(built)
    assert len(packed) < 1000
    assert np.array_equal(pickle.loads(packed).records, built.records)
    write_tar(tmp_path / "s.tar", {"a.png": b"A"})
    index_shards([shard])
    with pytest.raises(DataError, match=r"the index changed while in use; leave the shards alone"):
        _ = pickle.loads(packed).records


def _compress(path: Path) -> None:
    path.write_bytes(gzip.compress(path.read_bytes()))


def _cut(fraction: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(len(path.read_bytes()) * fraction)])


def _cut_at_member(path: Path) -> None:
    with tarfile.open(path) as tar:
        end = tar.getmembers()[4].offset
    path.write_bytes(path.read_bytes()[:end])


def _overwrite_header(path: Path) -> None:
    with tarfile.open(path) as tar:
        at = tar.getmembers()[4].offset
    data = bytearray(path.read_bytes())
    data[at : at + 512] = b"\xff" * 512
    path.write_bytes(data)


def _negative_size(path: Path) -> None:
    with tarfile.open(path) as tar:
        at = tar.getmembers()[4].offset
    data = bytearray(path.read_bytes())
    data[at + 124 : at + 136] = b"\xff" * 11 + b"\x00"  # base-256: minus 256
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    path.write_bytes(data)


def _join(path: Path) -> None:
    path.write_bytes(path.read_bytes() * 2)


DAMAGE = {
    "no bytes": (lambda path: path.write_bytes(b""), r"is an empty file; fetch it again"),
    "no members": (lambda path: path.write_bytes(bytes(10240)), r"holds no samples; remove it"),
    "no tar": (lambda path: path.write_bytes(b"hello" * 300), r"truncated or damaged at its first member \(byte 0 of 1,500"),
    "gzip": (_compress, r"is compressed \(gzip\), so no sample can be read by its offset; unpack it to \.tar"),
    "cut inside an image": (
        _cut(0.5),
        r"truncated or damaged inside member '0003.png' \(byte [\d,]+ of [\d,]+: .*\); fetch it again",
    ),
    "cut between members": (_cut_at_member, r"after member '0001.cls' \(byte [\d,]+ of [\d,]+: no end-of-archive marker\)"),
    "broken header": (_overwrite_header, r"after member '0001.cls' \(byte [\d,]+ of [\d,]+: bytes that are no tar header\)"),
    "negative size": (_negative_size, r"after member '0001.cls' \(byte [\d,]+ of [\d,]+: a member of negative size\)"),
    "two archives in one": (_join, r"more data follows the end-of-archive marker at byte [\d,]+, so samples would be lost"),
    "gone": (lambda path: path.unlink(), r"cannot be read \(No such file or directory\); check the path"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_shards_are_named_with_place_and_remedy(tmp_path: Path, write_tar: Callable, kind: str) -> None:
    damage, message = DAMAGE[kind]
    members = {}
    for number in range(5):
        members |= {f"{number:04d}.png": os.urandom(5000), f"{number:04d}.cls": b"1"}
    shard = write_tar(tmp_path / "bad.tar", members)
    damage(Path(shard))
    with pytest.raises(DataError, match=message) as error:
        build_index(shard)
    assert str(error.value).startswith(shard) and "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.index"))


MEMBERS = {
    "no image": (
        {"a.png": b"", "b.txt": b"", "b.cls": b"1"},
        r"sample 'b' has no image, only \.txt, \.cls; images end in \.jpg, ",
    ),
    "a label in words": ({"a.png": b"", "a.cls": b"cat"}, r"label 'a\.cls' is b'cat', not a whole number from 0"),
    "a negative label": ({"a.png": b"", "a.cls": b"-1"}, r"label 'a\.cls' is b'-1'"),
    "a negative label in json": ({"a.png": b"", "a.json": b'{"label": -1}'}, r"label 'a\.json' is b'-1'"),
    "broken json": ({"a.png": b"", "a.json": b"{"}, r"'a\.json' is not valid JSON"),
    "deep json": ({"a.png": b"", "a.json": b"[" * 100_000}, r"'a\.json' is not valid JSON"),
}


@pytest.mark.parametrize("kind", MEMBERS)
def test_samples_that_break_the_convention_are_named(tmp_path: Path, write_tar: Callable, kind: str) -> None:
    members, message = MEMBERS[kind]
    with pytest.raises(DataError, match=message):
        build_index(write_tar(tmp_path / "s.tar", members))


def test_a_member_twice_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("a.png"), io.BytesIO(b""))
    with pytest.raises(DataError, match=r"two members are named 'a\.png'"):
        tarscan.samples(str(tmp_path / "s.tar"))
