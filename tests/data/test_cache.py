"""The disk cache: what comes out is what went in, within a limit, with many processes at once and after damage."""

import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import BinaryIO

import pytest

from vitssl.data.cache import DiskCache, locked


def content(number: int, size: int = 10_000) -> bytes:
    return random.Random(number).randbytes(size)


def total(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_what_was_put_is_there(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "new/folder", limit=10**9)
    assert cache.get("a") is None
    cache.put("a", content(1))
    cache.put("b", b"")
    assert cache.get("a") == content(1) and cache.get("b") == b"" and cache.get("c") is None
    assert DiskCache(tmp_path / "new/folder", limit=10**9).get("a") == content(1)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"x" + data[1:], lambda data: data * 2]
)
def test_damage_is_found_and_dropped(tmp_path: Path, damage) -> None:
    cache = DiskCache(tmp_path, limit=10**9)
    cache.put("a", content(1))
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock")
    path.write_bytes(damage(path.read_bytes()))
    assert cache.get("a") is None and not path.exists()
    named = Path(cache.file("f", lambda file: file.write(content(2))))
    assert named.read_bytes() == content(2)
    named.write_bytes(damage(content(2)))
    filled = []
    assert Path(cache.file("f", lambda file: filled.append(file.write(content(3))))).read_bytes() == content(3) and filled


def test_the_least_recently_used_go(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, limit=100_000)
    for number in range(50):
        cache.put(str(number), content(number))
        os.utime(cache._path(str(number)), ns=(number, number))
        if number >= 5:
            assert cache.get("3") == content(3), "used again and again"
    assert total(tmp_path) <= 111_000
    assert cache.get("49") == content(49) and cache.get("10") is None


def test_a_file_larger_than_the_limit(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, limit=5000)
    for number in range(4):
        assert Path(cache.file(str(number), lambda file, number=number: file.write(content(number)))).read_bytes() == content(
            number
        )
    assert total(tmp_path) < 11_000, "only the newest is there"


def test_what_killed_processes_left_goes(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, limit=10**9)
    cache.put("a", content(1))
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    for name, age in (("old.tmp", 7200), ("new.tmp", 60)):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (time.time() - age,) * 2)
    DiskCache(tmp_path, limit=10**9).put("b", content(2))
    assert [path.name for path in tmp_path.rglob("*.tmp")] == ["new.tmp"]


def test_a_full_disk_stops_nobody(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    folder = tmp_path / "file"
    folder.write_bytes(b"")  # a file where a folder should be
    cache = DiskCache(folder, limit=10**9)
    cache.put("a", content(1))
    assert cache.get("a") is None


def test_what_fill_raises_leaves_nothing(tmp_path: Path) -> None:
    def fill(file: BinaryIO) -> None:
        file.write(b"half")
        raise ValueError("no more")

    cache = DiskCache(tmp_path, limit=10**9)
    with pytest.raises(ValueError, match="no more"):
        cache.file("a", fill)
    assert total(tmp_path) == 0 and Path(cache.file("a", lambda file: file.write(b"all"))).read_bytes() == b"all"


def many(arguments: tuple[str, int]) -> list[str]:
    """Put, get and file the same keys as others do, in a process of its own; returns what was wrong."""
    folder, seed = arguments
    cache, draw, wrong = DiskCache(Path(folder), limit=200_000), random.Random(seed), []
    for _ in range(150):
        number = draw.randrange(40)
        found = cache.get(str(number))
        if found is None:
            cache.put(str(number), content(number))
        elif found != content(number):
            wrong.append(f"get {number}")
        name = f"file {number % 5}"
        path = cache.file(name, lambda file, number=number: file.write(content(number % 5)))
        try:
            found = Path(path).read_bytes()
        except FileNotFoundError:  # others made room
            continue
        if found != content(number % 5):
            wrong.append(name)
    return wrong


def test_a_lock_is_not_inherited(tmp_path: Path) -> None:
    """A child that is forked while a thread holds it would wait for itself."""
    holds, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(tmp_path / "lock"):
            holds.set()
            go_on.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    holds.wait(10)
    if (child := os.fork()) == 0:
        signal.alarm(10)
        with locked(tmp_path / "lock"):
            os._exit(0)
    go_on.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_many_processes_at_once(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(many, [(str(tmp_path), seed) for seed in range(4)]) == [[]] * 4
    assert total(tmp_path) <= 250_000 and not list(tmp_path.rglob("*.tmp"))
