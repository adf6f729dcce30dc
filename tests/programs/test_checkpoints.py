"""Checkpoints on disk: what they hold, which are kept, and what becomes of damaged ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vitssl.train import checkpoint


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def swap(old: str, new: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


TENSORS, MANIFEST = "tensors_00000.safetensors", "manifest.json"
DAMAGE = {
    "flipped": (TENSORS, flip, "is damaged: its checksum"),
    "truncated": (TENSORS, cut, "is damaged: its checksum"),
    "missing": (TENSORS, Path.unlink, "is missing"),
    "manifest missing": (MANIFEST, Path.unlink, "cannot be read (No such file"),
    "manifest tells another count": (MANIFEST, swap('"updates": 20', '"updates": 21'), "is damaged: its checksum"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    pretrain: Callable, exported, tmp_path: Path, kind: str
) -> None:
    name, damage, message = DAMAGE[kind]
    shutil.copytree(exported.folder, tmp_path / "run")
    newest = tmp_path / "run/checkpoints/step_00000020"
    damage(newest / name)
    run = pretrain(tmp_path / "run", "checkpoint.every=5", "checkpoint.keep_last=9").ok()
    (warning,) = (line for line in run.out.splitlines() if line.startswith("warning"))
    assert str(newest / name) in warning and message in warning
    assert f"continuing {run.folder} from step 15" in run.out
    assert run.losses() == exported.losses()
    assert all(torch.equal(tensor, exported.tensors()[key]) for key, tensor in run.tensors().items())


def test_where_none_is_whole_it_stops(pretrain: Callable, exported, tmp_path: Path) -> None:
    shutil.copytree(exported.folder, tmp_path / "run")
    for folder in (tmp_path / "run/checkpoints").glob("step_*"):
        flip(folder / TENSORS)
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    run = pretrain(tmp_path / "run", "checkpoint.every=5")
    assert run.codes == [2] and run.out.count("warning") == 4
    assert run.err.startswith("error: none of the 4 checkpoints in ") and run.err.count("\n") == 1
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before and len(run.checkpoints()) == 4


def test_a_damaged_one_takes_no_whole_ones_place(pretrain: Callable, exported, tmp_path: Path) -> None:
    """Continued from step 10 beside damaged ones of 15 and 20: what is saved at 12 must survive the policy."""
    shutil.copytree(exported.folder, tmp_path / "run")
    for step in (15, 20):
        flip(tmp_path / f"run/checkpoints/step_{step:08}" / TENSORS)
    argv = ("checkpoint.every=3", "checkpoint.keep_last=1")
    trap = "import vitssl.train.session as session; real = session.checkpoint.prune\n" \
        "def stop(*a, **k):\n    real(*a, **k)\n    import os; os._exit(9)\nsession.checkpoint.prune = stop"  # fmt: skip
    assert pretrain(tmp_path / "run", *argv, trap=trap).codes == [9]
    run = pretrain(tmp_path / "run", *argv).ok()
    assert "from step 12" in run.out and run.out.count("warning") == 2
    assert run.losses() == exported.losses()


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (["every=2", "keep_last=1"], [20]),
        (["every=2", "keep_last=3"], [16, 18, 20]),
        (["every=2", "keep_last=2", "keep_every=6"], [6, 12, 18, 20]),
        (["every=10%", "keep_last=1", "keep_every=50%"], [10, 20]),
        (["every=null", "keep_last=2"], [20]),
        (["every=8", "keep_last=9"], [8, 16, 20]),
        (["every=null", "keep_last=9", "minutes=0.0000001"], list(range(12, 21))),
    ],
)
def test_what_is_kept(pretrain: Callable, tmp_path: Path, policy: list[str], kept: list[int]) -> None:
    run = pretrain(tmp_path / "run", *(f"checkpoint.{setting}" for setting in policy)).ok()
    assert run.checkpoints() == [run.folder / f"checkpoints/step_{step:08}" for step in kept]
    assert (run.folder / "checkpoints/LATEST").read_text() == run.checkpoints()[-1].name


def test_no_step_is_saved_twice(pretrain: Callable, tmp_path: Path) -> None:
    """To replace a checkpoint by its equal would leave none for a moment."""
    trap = "from vitssl.train import checkpoint; real = checkpoint.save\n" \
        "checkpoint.save = lambda root, saved: (print('saving', saved.step), real(root, saved))[1]"  # fmt: skip
    run = pretrain(tmp_path / "run", "checkpoint.every=5", "checkpoint.minutes=0.0000001", trap=trap).ok()
    assert [int(line.split()[1]) for line in run.out.splitlines() if line.startswith("saving")] == list(range(1, 21))


def test_processes_agree_once_on_a_checkpoint_that_is_due(pretrain: Callable, tmp_path: Path) -> None:
    """The first process asks, all know a step later; until it is written nobody asks again."""
    argv = ["checkpoint.every=null", "checkpoint.keep_last=99", "checkpoint.minutes=0.0000001"]
    run = pretrain(tmp_path / "run", *argv, processes=2).ok()
    assert run.checkpoints() == [run.folder / f"checkpoints/step_{step:08}" for step in range(2, 21, 2)]


def test_what_it_holds(exported) -> None:
    files = [path for path in (exported.folder / "checkpoints").rglob("*") if path.is_file()]
    assert {path.suffix if path.name != "LATEST" else path.name for path in files} == {".safetensors", ".json", "LATEST"}
    manifest = json.loads((exported.checkpoints()[-1] / MANIFEST).read_text())
    data = manifest["facts"].pop("data")
    assert data["samples"] == 60 and len(data["fingerprint"]) == 65
    assert manifest["step"] == 20 and manifest["facts"] == {"samples": 160, "layouts": [[1, 1024, 16]], "updates": 20}
    tensors = exported.tensors()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    state = {name.removeprefix("state/") for name in tensors if name.startswith("state/")}
    trained = state - {"encoder.vit.pos_embed", *(name for name in state if name.endswith("decoder.pos_embed"))}
    for moment in ("exp_avg", "exp_avg_sq"):
        assert {name.removeprefix(f"moments/{moment}/") for name in tensors if f"/{moment}/" in name} == trained
    assert manifest["files"][TENSORS]["tensors"] == len(tensors)


def saved(step: int, size: int = 4) -> checkpoint.Saved:
    state = {f"part{number}": torch.full((size,), float(step + number)) for number in range(3)}
    return checkpoint.Saved(step=step, state=state, moments={"exp_avg/part0": torch.ones(2)}, facts={"samples": step})


def test_views_of_one_storage_are_saved_apart(tmp_path: Path) -> None:
    table = torch.arange(6.0)
    views = checkpoint.Saved(1, {"all": table, "some": table[2:4], "column": table.view(3, 2)[:, 1]}, {}, {})
    back = checkpoint.load(checkpoint.save(tmp_path, views)).state
    assert back["some"].tolist() == [2.0, 3.0] and back["column"].tolist() == [1.0, 3.0, 5.0]


def test_a_name_that_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    for name in ("step_12", "step_0000001x", "mine", ".writing_step_00000004_1"):
        (tmp_path / name).mkdir()
    assert checkpoint.load_newest(tmp_path, tell=pytest.fail) is None
    checkpoint.save(tmp_path, saved(3))
    checkpoint.prune(tmp_path, newest=3, keep_last=1, keep_every=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "mine", "step_00000003", "step_0000001x", "step_12"]
