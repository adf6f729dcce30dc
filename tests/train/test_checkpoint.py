"""Checkpoints: exact round trips, whole or absent whenever the process dies, damage named, old ones kept by policy."""

import contextlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from vitssl.errors import CheckpointError
from vitssl.train import checkpoint
from vitssl.train.checkpoint import Saved, found, load, load_newest, prune, save, steps


class Killed(BaseException):
    """A process that ends here and now: nothing may catch it."""


def saved(step: int = 10) -> Saved:
    generator = torch.Generator().manual_seed(step)
    big = torch.randn(64, 8, generator=generator)
    state = {
        "a.weight": big,
        "a.half": torch.randn(5, generator=generator).bfloat16(),
        "a.view": big[3:5, ::2],
        "a.count": torch.tensor([2**40 + step, -1]),
        "a.flag": torch.tensor(True),
        "a.empty": torch.zeros(0, 3),
        "odd/name": torch.tensor(float("nan")),
    }
    moments = {"exp_avg/a.weight": big * 1e-30, "exp_avg_sq/a.weight": (big.double() ** 2).T}
    return Saved(step=step, state=state, moments=moments, facts={"samples": step * 8, "lanes": 3, "rate": 0.1 + 0.2})


def same(one: Saved, other: Saved) -> bool:
    def bits(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
        return {name: (t.dtype, t.shape, t.contiguous().view(-1).view(torch.uint8).tolist()) for name, t in tensors.items()}

    facts = (one.step, one.facts) == (other.step, other.facts)
    return facts and bits(one.state) == bits(other.state) and bits(one.moments) == bits(other.moments)


def newest(root: Path) -> tuple[Saved | None, list[str]]:
    told: list[str] = []
    return load_newest(root, tell=told.append), told


@pytest.mark.parametrize("shard_bytes, shards", [(2 * 2**30, 1), (1500, 4), (1, 8)])
def test_a_round_trip_is_exact(shard_bytes: int, shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", shard_bytes)
    folder = save(tmp_path / "checkpoints", saved())
    assert folder.name == "step_00000010" and (tmp_path / "checkpoints" / "LATEST").read_text() == "step_00000010"
    assert len(list(folder.glob("*.safetensors"))) == shards
    assert same(load(folder), saved())
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {(folder / "manifest.json").stat().st_mode & 0o777}


def test_the_newest_is_by_step(tmp_path: Path):
    for step in (20, 100_000_000, 3):
        save(tmp_path, saved(step))
    (tmp_path / "step_12").mkdir()  # not ours
    assert [path.name for path in found(tmp_path)] == ["step_00000003", "step_00000020", "step_100000000"]
    assert newest(tmp_path)[0].step == 100_000_000
    assert (tmp_path / "LATEST").read_text() == "step_00000003"


def test_where_there_is_none(tmp_path: Path):
    assert newest(tmp_path / "nowhere") == (None, [])
    assert newest(tmp_path) == (None, [])


STEPS = ("rename", "replace", "_sync", "_write", "save_file", "rmtree", "mkdir")


def die_at(number: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make the ``number``-th thing that touches the disk the last; returns the list of what was done."""
    done: list[str] = []

    def mortal(name: str, real: Callable) -> Callable:
        def act(*arguments, **options):
            if len(done) == number:
                raise Killed
            done.append(name)
            return real(*arguments, **options)

        return act

    for owner, name in [(os, "rename"), (os, "replace"), (shutil, "rmtree"), (Path, "mkdir")]:
        monkeypatch.setattr(owner, name, mortal(name, getattr(owner, name)))
    for name in ("_sync", "_write", "save_file"):
        monkeypatch.setattr(checkpoint, name, mortal(name, getattr(checkpoint, name)))
    return done


@pytest.mark.parametrize("damaged", [False, True])
def test_killed_anywhere_the_old_or_the_new_one_is_whole(damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where a damaged checkpoint of the same step lies in the way."""
    steps_seen = []
    for number in range(99):
        root = tmp_path / str(number)
        save(root, saved(10))
        if damaged:
            (save(root, saved(20)) / "manifest.json").write_text("{")
        with monkeypatch.context() as patch:
            done = die_at(number, patch)
            try:
                save(root, saved(20))
                finished = True
            except Killed:
                finished = False
        kept, _ = newest(root)
        assert same(kept, saved(kept.step))
        steps_seen.append(kept.step)
        prune(root, newest=20, keep_last=9, keep_every=None)
        assert not list(root.glob(".*")), "what a dead process left is cleared away"
        if finished:
            break
    assert set(done) == set(STEPS) and number > 8
    assert sorted(steps_seen) == steps_seen and set(steps_seen) == {10, 20}


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
@pytest.mark.parametrize("earlier, rest", [(True, "the newest whole checkpoint is step_00000010"), (False, "no earlier")])
def test_a_full_disk(error: Exception, earlier: bool, rest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if earlier:
        save(tmp_path, saved(10))

    def fail(*arguments):
        raise error

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(CheckpointError, match=f"step_00000020 could not be written: .*No space left on device; {rest}"):
        save(tmp_path, saved(20))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "step"))] == ["step_00000010"][:earlier]


def flip(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)


def rewrite(folder: Path, **changes) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


SHARD = "tensors_00000.safetensors"
DAMAGE = {
    "a bit of a shard": (lambda folder: flip(folder / SHARD, -1), f"{SHARD} is damaged: its checksum is not the one in"),
    "a shard cut short": (lambda folder: os.truncate(folder / SHARD, 900), f"{SHARD} is damaged"),
    "an empty shard": (lambda folder: os.truncate(folder / SHARD, 0), f"{SHARD} is damaged"),
    "no shard": (lambda folder: (folder / SHARD).unlink(), f"{SHARD} is missing"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json cannot be read .No such file"),
    "half a manifest": (lambda folder: os.truncate(folder / "manifest.json", 100), "manifest.json cannot be read"),
    "no table": (lambda folder: (folder / "manifest.json").write_text("[1, 2]"), "manifest.json cannot be read"),
    "no text": (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json cannot be read"),
    "a fact changed": (lambda folder: rewrite(folder, facts={"lanes": 4}), "manifest.json is damaged: its checksum"),
    "another step": (lambda folder: rewrite(folder, step=11), "manifest.json is damaged: its checksum"),
    "another format": (lambda folder: rewrite(folder, format=2), "manifest.json has format 2, this program reads 1"),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_and_the_one_before_is_used(damage: Callable, message: str, tmp_path: Path):
    save(tmp_path, saved(10))
    damage(save(tmp_path, saved(20)))
    with pytest.raises(CheckpointError, match=message) as error:
        load(tmp_path / "step_00000020")
    assert "\n" not in str(error.value)
    kept, told = newest(tmp_path)
    assert same(kept, saved(10))
    assert len(told) == 1 and re.search(f"step_00000020/.*{message}.*; using the checkpoint before it", told[0])


def test_nothing_whole_is_an_error_and_no_fresh_start(tmp_path: Path):
    for step in (10, 20):
        (save(tmp_path, saved(step)) / SHARD).unlink()
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints in .* is whole; remove the folder to start afresh"):
        newest(tmp_path)


@settings(max_examples=40, deadline=None)
@given(st.booleans(), st.integers(0, 10**6), st.integers(0, 7))
def test_any_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, in_manifest: bool, place: int, bit: int):
    folder = save(tmp_path_factory.mktemp("flipped"), saved())
    flip(folder / ("manifest.json" if in_manifest else SHARD), place, bit)
    with contextlib.suppress(CheckpointError):
        loaded = load(folder)
        assert in_manifest and same(loaded, saved())  # another last digit of the same floating-point number


def test_nothing_unpickles(tmp_path: Path):
    """A pickle in the place of every file, with checksums that fit, is refused and not run."""

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    folder = save(tmp_path / "checkpoints", saved())
    (folder / SHARD).write_bytes(pickle.dumps(Trap()))
    (folder / "optimizer.pt").write_bytes(pickle.dumps(Trap()))
    words = json.loads((folder / "manifest.json").read_text())
    words["files"][SHARD] |= {"sha256": checkpoint._digest(folder / SHARD), "bytes": (folder / SHARD).stat().st_size}
    del words["sha256"]
    rewrite(folder, **words, sha256=checkpoint._own_digest(words))
    with pytest.raises(CheckpointError, match=f"{SHARD} is no safetensors file"):
        load(folder)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(Trap()))
    assert (tmp_path / "sprung").exists(), "the trap works"


def test_a_damaged_checkpoint_takes_no_whole_one_s_place(tmp_path: Path):
    for step in (80, 95):
        (tmp_path / f"step_{step:08}").mkdir()

    def left(newest: int) -> list[int]:
        (tmp_path / f"step_{newest:08}").mkdir()
        prune(tmp_path, newest=newest, keep_last=2, keep_every=None, damaged={95})
        return steps(tmp_path)

    assert left(90) == [80, 90, 95]
    assert left(100) == [90, 100]


@settings(max_examples=40, deadline=None)
@given(
    st.sets(st.integers(1, 30), max_size=8), st.integers(1, 4), st.none() | st.integers(1, 7), st.none() | st.integers(0, 30)
)
def test_the_policy_keeps_the_last_and_the_first_at_or_after_each_multiple(
    tmp_path_factory: pytest.TempPathFactory, steps: set[int], last: int, every: int | None, upto: int | None
):
    root = tmp_path_factory.mktemp("policy")
    for step in steps:
        (root / f"step_{step:08}").mkdir()
    (root / ".writing_step_00000007_123").mkdir()
    (root / "LATEST").touch()
    reached = max(steps, default=0) if upto is None else upto
    prune(root, newest=reached, keep_last=last, keep_every=every)
    past = sorted(step for step in steps if step <= reached)
    multiples = {step // every for step in past} - {0} if every else set()
    firsts = {min(step for step in past if step // every == number) for number in multiples}
    kept = {step for step in steps if step > reached or step in past[-last:] or step in firsts}
    assert {path.name for path in root.iterdir()} == {"LATEST", *(f"step_{step:08}" for step in kept)}
