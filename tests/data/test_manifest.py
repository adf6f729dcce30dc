"""The manifest: one read for a folder of shards, made anew where shards changed, never believed where it is damaged."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vitssl.data import manifest
from vitssl.data.index import build_index
from vitssl.data.manifest import NAME, index_shards
from vitssl.errors import DataError


@pytest.fixture
def shards(tmp_path: Path, write_tar: Callable) -> list[str]:
    """Four shards of 1 to 4 samples; the last has a label nowhere, and another file in it."""
    folder = tmp_path / "shards"
    folder.mkdir()
    found = []
    for shard in range(4):
        members = {f"{number}.png": b"x" * shard for number in range(shard + 1)}
        members |= {f"{number}.cls": b"1" for number in range(shard + 1)} if shard < 3 else {"README": b"hm"}
        found.append(write_tar(folder / f"s{'x' * shard}-{shard}.tar", members))
    return found


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the moment it is called, no shard and no sidecar is looked into."""

    def refuse(*_: object) -> None:
        raise AssertionError("looked into a shard")

    def begin() -> None:
        monkeypatch.setattr(manifest, "load_index", refuse)
        monkeypatch.setattr(manifest, "build_index", refuse)

    return begin


def counts(found: manifest.Manifest) -> list[tuple[int, int, int]]:
    return list(zip(*(found.rows[name].tolist() for name in ("samples", "unlabelled", "ignored")), strict=True))


COUNTS = [(1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 4, 1)]


def test_a_second_look_is_one_read(shards: list[str], untouched: Callable) -> None:
    first = index_shards(shards)
    assert counts(first) == COUNTS and [first.open(number).num_samples for number in range(4)] == [1, 2, 3, 4]
    untouched()
    again = index_shards(shards[::-1])
    assert counts(again) == COUNTS[::-1] and np.array_equal(again.rows["identity"], first.rows["identity"][::-1])


def test_a_changed_shard_is_counted_anew_and_the_others_are_not(shards: list[str], write_tar: Callable, monkeypatch) -> None:
    before = index_shards(shards)
    write_tar(Path(shards[1]), {"a.png": b"", "b.png": b"", "c.png": b""})
    looked: list[str] = []
    monkeypatch.setattr(manifest, "build_index", lambda shard, access: (looked.append(shard), build_index(shard, access))[1])
    after = index_shards(shards)
    assert looked == [shards[1]] and counts(after) == [COUNTS[0], (3, 3, 0), *COUNTS[2:]]
    with pytest.raises(DataError, match=r"its index changed while in use; leave the shards alone and start again"):
        before.open(1)
    Path(shards[2]).touch()  # another time, the same bytes: its sidecar still fits
    assert counts(index_shards(shards)) == counts(after) and looked == [shards[1]]


def test_lists_of_one_folder_share_its_manifest(shards: list[str], untouched: Callable) -> None:
    index_shards(shards[:2])
    index_shards(shards[1:])
    Path(shards[0]).unlink()
    Path(shards[3]).touch()
    index_shards(shards[3:])
    names = manifest.read_manifest(str(Path(shards[0]).parent))["name"].tolist()
    assert names == sorted(Path(shard).name.encode() for shard in shards[1:])
    untouched()
    assert counts(index_shards(shards[1:])) == COUNTS[1:]


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-1], lambda data: b"", lambda data: b"[]\n", lambda data: b"\x80\x04N.", lambda data: b"{}\n" + data,
     lambda data: data.replace(b'"version": 1', b'"version": 0'), lambda data: data.replace(b'"shards": 4', b'"shards": 9')],
)  # fmt: skip
def test_a_damaged_or_foreign_manifest_is_made_anew(shards: list[str], damage: Callable) -> None:
    index_shards(shards)
    path = Path(shards[0]).parent / NAME
    good = path.read_bytes()
    path.write_bytes(damage(good))
    assert counts(index_shards(shards)) == COUNTS and path.read_bytes() == good


def test_the_cache_is_used_where_the_folder_is_not_writable(shards: list[str], cache: Path, untouched: Callable) -> None:
    (Path(shards[0]).parent / NAME).mkdir()
    index_shards(shards)
    assert [path.suffix for path in (cache / "index").iterdir()] == [".manifest"]
    untouched()
    assert counts(index_shards(shards)) == COUNTS


def test_a_shard_that_is_gone_is_named(shards: list[str]) -> None:
    index_shards(shards)
    Path(shards[2]).unlink()
    with pytest.raises(DataError, match=r"sxx-2\.tar: cannot be read \(No such file or directory\)"):
        index_shards(shards)


@pytest.mark.parametrize("processes", [1, 2])
def test_many_shards_in_order_with_progress(tmp_path: Path, write_tar: Callable, processes: int) -> None:
    shards = [write_tar(tmp_path / f"{number}.tar", {f"{number}.png": b"x"}) for number in range(6)]
    build_index(shards[2])
    calls = []
    found = index_shards(shards, progress=lambda done, total: calls.append((done, total)), processes=processes)
    assert [found.open(number).records["key"][0] for number in range(6)] == [str(number).encode() for number in range(6)]
    assert calls == [(done, 6) for done in range(1, 7)]
    (tmp_path / "5.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"5\.tar: is an empty file"):
        index_shards([str(tmp_path / "5.tar"), *(write_tar(tmp_path / f"n{n}.tar", {"a.png": b""}) for n in range(4))])
