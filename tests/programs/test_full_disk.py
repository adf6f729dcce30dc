"""No room for what is to be written: what was written stays whole, and with room the same command goes on."""

import ctypes
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from outcome import refused


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """``disk(size)``: a folder that holds no more than that; called again, it is given more room."""
    folder, libc = tmp_path / "disk", ctypes.CDLL(None, use_errno=True)

    def mount(size: str) -> Path:
        remount = 32 if folder.exists() else 0
        folder.mkdir(exist_ok=True)
        if os.geteuid() or libc.mount(b"none", str(folder).encode(), b"tmpfs", remount, f"size={size}".encode()):
            pytest.skip("needs the right to mount a tmpfs")
        return folder

    yield mount
    libc.umount2(str(folder).encode(), 2)


def test_no_space_left(pretrain: Callable, disk: Callable) -> None:
    """The run ends, the checkpoints that were written stay whole, and with more room the same command goes on."""
    argv = ["checkpoint.every=2", "checkpoint.keep_last=99", "heldout.pictures=0"]
    run = pretrain(disk("1200k") / "run", *argv)
    refused(run, "No space left on device", "the newest whole checkpoint is step_", "free space and run the same command")
    kept = run.checkpoints()
    assert kept and not list((run.folder / "checkpoints").glob(".writing*"))
    again = pretrain(disk("20m") / "run", *argv).ok()
    assert f"from step {int(kept[-1].name[5:])}" in again.out and "warning" not in again.out
    assert len(again.losses()) == 20


def test_no_space_for_anything(pretrain: Callable, disk: Callable) -> None:
    folder = disk("4k")
    refused(pretrain(folder / "run"), "no space left on the device while writing ", "run the same command to go on")
    assert len(pretrain(disk("20m") / "run").ok().losses()) == 20


def test_an_export_that_cannot_be_written(pretrain: Callable, tmp_path: Path) -> None:
    trap = "import resource, pretrain.run as program; real = program.write_export\n" \
        "def write(*a):\n    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); return real(*a)\n" \
        "program.write_export = write"  # fmt: skip
    run = pretrain(tmp_path / "run", trap=trap)
    refused(run, "export/encoder.safetensors could not be written: ", "run the same command again")
    assert not list((run.folder / "export").iterdir()) and [path.name for path in run.checkpoints()] == ["step_00000010"]
    again = pretrain(tmp_path / "run").ok()
    assert "from step 10" in again.out and (run.folder / "export/encoder.safetensors").exists()


@pytest.mark.parametrize("limit", [9_000, 90_000, 130_000])
def test_a_file_that_may_not_grow(pretrain: Callable, tmp_path: Path, limit: int) -> None:
    """Where no disk can be filled, a limit on the size of files stops a write half-way."""
    trap = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {resource.RLIM_INFINITY}))"
    run = pretrain(tmp_path / "run", "heldout.pictures=0", trap=trap)
    refused(run, "could not be written: ", "no earlier checkpoint exists")
    assert not list((run.folder / "checkpoints").iterdir())


def test_not_even_the_config_fits(pretrain: Callable, tmp_path: Path) -> None:
    trap = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, {resource.RLIM_INFINITY}))"
    refused(pretrain(tmp_path / "run", trap=trap), "file too large while writing", "free some and run the same command")
