"""Images and shards that are missing, damaged, or not those the run was begun with: named in one line, and no step is lost."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from outcome import refused


def test_other_data_than_the_runs(pretrain: Callable, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    argv = [f"data.path={tmp_path / 'data'}", "checkpoint.every=10"]
    pretrain(tmp_path / "run", *argv).ok()
    shutil.copy(tmp_path / "data/test-0.tar", tmp_path / "data/train-9.tar")
    run = pretrain(tmp_path / "run", *argv, "length=30")
    refused(run, "is not the data that", "was begun on (60 images then, 76 now)", "put it back")
    (tmp_path / "data/train-9.tar").unlink()
    shutil.copy(tmp_path / "data/train-0.tar", tmp_path / "data/train-2.tar")
    refused(pretrain(tmp_path / "run", *argv, "length=30"), "(other images, as many as then)")
    shutil.copy(data / "train-2.tar", tmp_path / "data/train-2.tar")
    assert "from step 20" in pretrain(tmp_path / "run", *argv, "length=30").ok().out


def drop(folder: Path) -> None:
    for path in folder.glob("train-*.tar"):
        path.unlink()


def cut(folder: Path) -> None:
    content = (folder / "train-1.tar").read_bytes()
    (folder / "train-1.tar").write_bytes(content[: len(content) // 2 + 100])


def scribble(folder: Path) -> None:
    """Overwrite the image of key 0027, after its header."""
    content = (folder / "train-1.tar").read_bytes()
    start = content.index(b"0027.jpg") + 512
    (folder / "train-1.tar").write_bytes(content[:start] + b"x" * 200 + content[start + 200 :])


FILES = {
    "no shards": (drop, "data.split=train", ["train", "test-0.tar"]),
    "a pattern that meets nothing": (None, "data.path={data}/train-{{7..9}}.tar", ["train-7.tar", "test-0.tar to train-2.tar"]),
    "an empty tar": (lambda folder: (folder / "train-2.tar").write_bytes(b""), "", ["train-2.tar: is an empty file"]),
    "a truncated tar": (cut, "", ["train-1.tar: is truncated or damaged", "byte"]),
    "an image that does not decode": (scribble, "", ["train-1.tar", "0027"]),
    "no such folder": (None, "data.path=/no/where", ["/no/where"]),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("case", FILES)
def test_data_that_cannot_be_read(pretrain: Callable, data: Path, tmp_path: Path, case: str, workers: int) -> None:
    damage, setting, words = FILES[case]
    shutil.copytree(data, tmp_path / "data")
    if damage:
        damage(tmp_path / "data")
    argv = [f"data.path={tmp_path / 'data'}", *([setting.format(data=data)] if setting else [])]
    argv += ["data.split=null"] if "data.path" in setting else []
    refused(pretrain(tmp_path / "run", *argv, f"data.workers={workers}", "data.max_bad_fraction=0"), *words)


RUINED_IMAGE = """
import os
from vitssl.data import transforms
from vitssl.errors import DataError
real, count = transforms.decode, [0]
def decode(*arguments, **options):
    count[0] += 1
    if os.environ.get("RANK", "1") == "1" and count[0] > {after}:
        raise DataError("train-0.tar: 0007 does not decode")
    return real(*arguments, **options)
transforms.decode = decode
"""


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_an_image_met_on_the_way_costs_no_step(
    pretrain: Callable, exported, tmp_path: Path, processes: int, accumulation: int
) -> None:
    """Every process learns of it before the step that has no batch, saves the one before it, and says the same."""
    share = 8 // processes
    argv = ["heldout.every=100", "checkpoint.every=100", f"micro_batch={share // accumulation}", "data.max_bad_fraction=0"]
    trap = RUINED_IMAGE.format(after=9 * share + share // 2)
    run = pretrain(tmp_path / "run", *argv, processes=processes, trap=trap)
    assert run.codes == [2] * processes
    said = [err.read_text() for _, err in run.files]
    assert said[0] == "error: train-0.tar: 0007 does not decode\n"
    assert said[1:] == ["error in process 1: train-0.tar: 0007 does not decode\n"][: processes - 1]
    assert [path.name for path in run.checkpoints()] == ["step_00000009"] and len(run.losses()) == 9
    again = pretrain(tmp_path / "run", *argv, processes=processes).ok()
    assert "from step 9" in again.out and again.losses() == pytest.approx(exported.losses(), rel=1e-5)


def ruin(folder: Path, *keys: int) -> None:
    """Overwrite these images of the test shard."""
    content = (folder / "test-0.tar").read_bytes()
    for key in keys:
        start = content.index(f"{key:04}.jpg".encode()) + 512
        content = content[:start] + b"x" * 200 + content[start + 200 :]
    (folder / "test-0.tar").write_bytes(content)


@pytest.mark.parametrize("processes", [1, 2])
def test_images_that_are_only_looked_at_are_left_out_and_told(
    pretrain: Callable, finetune: Callable, data: Path, tmp_path: Path, processes: int
) -> None:
    shutil.copytree(data, tmp_path / "data")
    ruin(tmp_path / "data", 66)
    test = [f"{{}}.path={tmp_path / 'data'}", "{}.split=test"]
    words = f"1 of 16 images of {tmp_path / 'data'}/test-0.tar left out; the first: {tmp_path / 'data'}/test-0.tar: 0066.jpg"
    run = finetune(tmp_path / "run", *(each.format("test") for each in test), "test.every=4", processes=processes).ok()
    assert words in run.out and (run.folder / "export/last/classifier.safetensors").exists()
    watched = [each.format(key) for key in ("heldout", "probe.queries") for each in test]
    watched += [f"probe.bank.path={data}", "probe.bank.split=train", "heldout.samples=16"]
    run = pretrain(tmp_path / "pre", *watched, processes=processes).ok()
    assert run.out.count(words) >= 3 and (run.folder / "export/encoder.safetensors").exists()


def test_a_run_whose_last_evaluation_fails_is_not_finished(finetune: Callable, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    ruin(tmp_path / "data", *range(60, 76))
    argv = ["test.every=4", "checkpoint.every=100"]
    for step in (4, 8):
        run = finetune(tmp_path / "run", f"test.path={tmp_path / 'data'}", *argv)
        refused(run, "none of 16 images can be used; the first", "test-0.tar: 0060.jpg")
        assert run.checkpoints()[-1].name == f"step_{step:08}"
    for _ in range(2):
        run = finetune(tmp_path / "run", f"test.path={tmp_path / 'data'}", *argv, "length=10")
        refused(run, "none of 16 images can be used")
        assert run.checkpoints()[-1].name == "step_00000008"
    assert "from step 8" in finetune(tmp_path / "run", *argv).ok().out


CRASH = """
import sys
from vitssl.train.launch import Engine
step, count = Engine.step, [0]
def crash(self, **options):
    count[0] += 1
    if count[0] == 3:
        raise RuntimeError("out of luck")
    return step(self, **options)
Engine.step = crash
from pretrain.__main__ import main
from vitssl.report import program
sys.exit(program(main, sys.argv[1:]))
"""


def test_a_crash_ends_with_its_workers(data: Path, tmp_path: Path) -> None:
    """In a process of its own: the others of these tests leave without taking their interpreter down."""
    argv = ["tests/tiny.yaml", f"data.path={data}", "data.split=train", f"run.dir={tmp_path}", "data.workers=2"]
    run = subprocess.run(
        [sys.executable, "-c", CRASH, *argv], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 1 and run.stderr.rstrip().endswith("RuntimeError: out of luck")


@pytest.fixture
def damaged(data: Path, tmp_path: Path) -> Path:
    """The shards with one image of 60 overwritten."""
    shutil.copytree(data, tmp_path / "data")
    scribble(tmp_path / "data")
    return tmp_path / "data"


def test_training_goes_on_over_a_damaged_image(pretrain: Callable, damaged: Path, tmp_path: Path) -> None:
    """It is replaced, written down and counted; stopped and continued, and on two processes, the run stays the same."""
    argv = [f"data.path={damaged}", "data.ledger=true", "heldout.every=100", "checkpoint.every=4", "checkpoint.keep_last=99"]
    run = pretrain(tmp_path / "one", *argv).ok()
    rows = run.rows("quarantine.jsonl")
    assert {row["key"] for row in rows} == {"train-1.tar/0027"} and len(rows) == len({row["position"] for row in rows}) >= 2
    assert all("train-1.tar: 0027.jpg (byte " in row["reason"] and "is no image of a known" in row["reason"] for row in rows)
    assert all(row["step"] == row["position"] // 8 + 1 and row["served"] != row["key"] for row in rows)
    assert f"{len(rows)} bad images" in run.out.split("step 20/20")[1].splitlines()[0]
    lines = [json.loads(line) for line in (run.folder / "ledger/process_00000.jsonl").read_text().splitlines()]
    served = {int(position): key for line in lines for position, key in line.get("served", {}).items()}
    assert served == {row["position"]: row["served"] for row in rows}
    for step in (8, 12, 16, 20):  # as if it had died after step 4, before the first of them
        shutil.rmtree(run.folder / f"checkpoints/step_{step:08}")
    again = pretrain(tmp_path / "one", *argv, "data.workers=1").ok()
    assert "from step 4" in again.out and again.rows("quarantine.jsonl") == rows
    two = pretrain(tmp_path / "two", *argv, processes=2).ok()
    assert two.rows("quarantine.jsonl") == rows and two.losses() == pytest.approx(run.losses(), rel=1e-5)


def test_a_quarantine_file_is_followed_and_not_counted(pretrain: Callable, damaged: Path, tmp_path: Path) -> None:
    argv = [f"data.path={damaged}", "heldout.every=100", "length=10"]
    first = pretrain(tmp_path / "one", *argv).ok()
    (tmp_path / "list.jsonl").write_text('{"key": "train-1.tar/0027"}\n{"key": "train-0.tar/0003"}\n')
    run = pretrain(tmp_path / "two", *argv, f"data.quarantine={tmp_path / 'list.jsonl'}", "data.max_bad_fraction=0").ok()
    rows = run.rows("quarantine.jsonl")
    assert {row["key"] for row in rows} == {"train-1.tar/0027", "train-0.tar/0003"}
    assert all(row["known"] and "named in the quarantine file" in row["reason"] for row in rows)
    theirs = first.rows("quarantine.jsonl")
    assert [row["served"] for row in rows if "0027" in row["key"]] == [row["served"] for row in theirs]
    for content, words in ((None, "cannot be read (No such file"), ("[1]", "is no quarantine.jsonl of a run")):
        if content:
            (tmp_path / "bad.jsonl").write_text(content)
        refused(pretrain(tmp_path / "run", *argv, f"data.quarantine={tmp_path / 'bad.jsonl'}"), words)


def test_more_damage_than_is_borne_stops_the_run(pretrain: Callable, damaged: Path, tmp_path: Path) -> None:
    argv = [f"data.path={damaged}", "heldout.every=100", "checkpoint.every=100", "data.max_bad_fraction=0.002", "length=40"]
    run = pretrain(tmp_path / "run", *argv)
    refused(
        run,
        "train-1.tar: 0027.jpg",
        "; 3 of ",
        "images could not be used, data.max_bad_fraction=0.002 bears no more (quarantine.jsonl)",
    )
    assert len(run.checkpoints()) == 1 and len(run.rows("quarantine.jsonl")) == 2
