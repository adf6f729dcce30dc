"""The tools as the processes that people start."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


def vitssl(*argv: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "import sys; from vitssl.cli import entry; sys.exit(entry())", *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | env)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for number in range(5):
        with tarfile.open(tmp_path / f"s-{number}.tar", "w") as tar:
            for key in range(number + 1):
                tar.addfile(tarfile.TarInfo(f"{key}.jpg"))
            tar.addfile(tarfile.TarInfo("README"))
    return tmp_path


def test_index_counts_and_leaves_a_manifest(shards: Path) -> None:
    for _ in range(2):
        done = vitssl("index", str(shards / "s-{0..3}.tar"), str(shards / "s-4.tar"), "--processes", "2")
        assert done.returncode == 0 and done.stderr == ""
        assert "5 shards, 0.00 GiB" in done.stdout and "15, no labels" in done.stdout and "1 to 5" in done.stdout
        assert "5 other members" in done.stdout
    assert (shards / "vitssl.manifest").exists() and len(list(shards.glob("*.tar.index"))) == 5


def test_what_cannot_be_is_one_line(shards: Path) -> None:
    (shards / "s-2.tar").write_bytes(b"")
    for argv, words in (
        (["index", str(shards)], "s-2.tar: is an empty file"),
        (["index", "/nowhere"], "/nowhere: nothing is there"),
    ):
        done = vitssl(*argv)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, vitssl.cli as cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "index" in done.stdout, done.stderr


def test_pack_writes_what_pretrain_reads(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (40 * number, 0, 0)).save(tmp_path / f"photos/{number}.png")
    paths = [str(tmp_path / "photos"), str(tmp_path / "out")]
    done = vitssl("pack", *paths, "--short-side=15", "--shard-mib=0.004", "--perceptual")
    assert done.returncode == 0 and done.stderr == ""
    assert "3 shards in" in done.stdout and "6 of 6 (0 left out" in done.stdout and "0 images are exact copies" in done.stdout
    assert f"python -m pretrain CONFIG data.path={tmp_path / 'out'} data.split=train" in done.stdout
    assert vitssl("pack", *paths).returncode == 2


def test_check_tells_and_draws(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"photos/{'ab'[number % 2]}").mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (40, 30), (40 * number, 0, 0)).save(tmp_path / f"photos/{'ab'[number % 2]}/{number}.png")
    done = vitssl("check", str(tmp_path / "photos"), f"--html={tmp_path / 'page.html'}")
    assert done.returncode == 0 and done.stderr == "" and "5, of which 0 are damaged" in done.stdout
    assert "data.mean=[0.314, 0.000, 0.000]" in done.stdout
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    (tmp_path / "photos/a/0.png").write_bytes(b"")
    done = vitssl("check", str(tmp_path / "photos"))
    assert done.returncode == 1 and "0.png: is empty" in done.stdout


def test_check_reads_arrays_of_as_many_channels_as_it_is_told(tmp_path: Path) -> None:
    for number in range(4):
        np.save(tmp_path / f"{number}.npy", np.full((5, 30, 20), 51 * number, dtype=np.uint8))
    done = vitssl("check", str(tmp_path), "--channels=5")
    assert done.returncode == 0 and done.stderr == "" and "4, of which 0 are damaged" in done.stdout
    assert "NPY 4" in done.stdout and "20 px" in done.stdout and f"data.mean=[{', '.join(['0.300'] * 5)}]" in done.stdout
    assert vitssl("check", str(tmp_path)).returncode == 1
