"""Runs of the two programs as real processes, and a small labelled set of tar shards for them."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outcome import WAIT
from PIL import Image

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0  # seconds after which a run counts as hanging


@dataclass
class Run:
    """One run of a program: its processes while it lasts, then what it left."""

    folder: Path
    forks: "Forks"
    files: list[tuple[Path, Path]]
    pids: list[int] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)

    @property
    def out(self) -> str:
        return self.files[0][0].read_text()

    @property
    def err(self) -> str:
        return self.files[0][1].read_text()

    def kill(self, number: int = signal.SIGKILL) -> None:
        for pid in self.pids:
            os.kill(pid, number)

    def wait(self) -> "Run":
        for pid in self.pids[len(self.codes) :]:
            code = self.forks.ask(wait=pid, timeout=PATIENCE)["code"]
            if code is None:
                self.kill()
                said = "\n".join(path.read_text() for pair in self.files for path in pair)
                pytest.fail(f"still running after {PATIENCE} s:\n{said}")
            self.codes.append(code)
        return self

    def ok(self) -> "Run":
        """Wait, and be sure that every process ended well."""
        self.wait()
        said = "\n".join(path.read_text() for pair in self.files for path in pair)
        assert self.codes == [0] * len(self.codes), said
        return self

    def rows(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def losses(self) -> list[float]:
        """One a step, in order; a step that is missing or stands twice is a failure."""
        rows = self.rows()
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        return [row["loss"] for row in rows]

    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("step_*"))

    def tensors(self, checkpoint: int = -1) -> dict[str, Any]:
        """Every tensor of a checkpoint: parameters and moments."""
        from safetensors.torch import load_file

        found: dict[str, Any] = {}
        for path in sorted(self.checkpoints()[checkpoint].glob("*.safetensors")):
            found |= load_file(path)
        return found


class Forks:
    """The other end of ``forks.py``."""

    def __init__(self) -> None:
        env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT), "COLUMNS": "400"}
        self.server = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("forks.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT,
        )  # fmt: skip
        assert json.loads(self.server.stdout.readline()) == {"ready": True}

    def ask(self, **request: Any) -> dict[str, Any]:
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    forks = Forks()
    yield forks
    forks.server.stdin.close()
    forks.server.wait(10)


@pytest.fixture(scope="session")
def start(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """``start(program, folder, *argv)``: begin a run whose folder is ``folder``, in ``processes`` processes, and return.

    A program with a dot in its name (``finetune.embed``) keeps no run, and is told where to write by ``argv``.
    """
    logs, cache = tmp_path_factory.mktemp("logs"), tmp_path_factory.mktemp("cache")

    def begin(program: str, folder: Path, *argv: str, processes: int = 1, env: dict | None = None, trap: str | None = None):
        number = len(list(logs.iterdir()))
        files = [(logs / f"{number}_{rank}.out", logs / f"{number}_{rank}.err") for rank in range(processes)]
        run = Run(folder, forks, files)
        port = free_port()
        for rank, (out, err) in enumerate(files):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            launcher = ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if processes > 1 else {}
            named = [] if "." in program else [f"run.dir={folder.parent}", f"run.name={folder.name}"]
            job = {
                "program": program,
                "argv": last_of_each([*argv, *named]),
                "env": {"VITSSL_CACHE": str(cache)} | {key: str(value) for key, value in launcher.items()} | (env or {}),
                "cwd": str(ROOT),
                "out": str(out),
                "err": str(err),
                "trap": trap,
            }
            run.pids.append(forks.ask(start=job)["pid"])
        return run

    return begin


def last_of_each(argv: list[str]) -> list[str]:
    """A test's own settings replace those that all tests share; the programs themselves refuse a key given twice."""
    return list({word.partition("=")[0] if "=" in word else word: word for word in argv}.values())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def pretrain(start: Callable[..., Run], data: Path) -> Callable[..., Run]:
    """``pretrain(folder, *overrides)``: a run of ``tests/tiny.yaml`` on the shards, to its end."""

    def run(folder: Path, *argv: str, wait: bool = True, **options: Any) -> Run:
        run = start("pretrain", folder, "tests/tiny.yaml", f"data.path={data}", "data.split=train", *argv, **options)
        return run.wait() if wait else run

    return run


@pytest.fixture(scope="session")
def finetune(start: Callable[..., Run], data: Path, exported: Run) -> Callable[..., Run]:
    """``finetune(folder, *overrides)``: a run of ``tests/tiny_finetune.yaml`` from the exported encoder, to its end."""

    def run(folder: Path, *argv: str, **options: Any) -> Run:
        source = [f"encoder={exported.folder}", f"data.path={data}", "data.split=train"]
        test = [f"test.path={data}", "test.split=test"]
        return start("finetune", folder, "tests/tiny_finetune.yaml", *source, *test, *argv, **options).wait()

    return run


@pytest.fixture(scope="session")
def exported(pretrain: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished pretraining of 20 steps with checkpoints at 5, 10, 15 and 20. Copy it before changing anything in it."""
    return pretrain(tmp_path_factory.mktemp("exported") / "run", "checkpoint.every=5", "checkpoint.keep_last=9").ok()


@pytest.fixture(scope="session")
def waited(pretrain: Callable[..., Run], exported: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Ten steps from the exported weights, of which the encoder waits for six; a checkpoint after each."""
    folder = tmp_path_factory.mktemp("waited") / "run"
    return pretrain(folder, *WAIT, f"init.weights={exported.folder}").ok()


@pytest.fixture(scope="session", name="picture")
def picture_fixture() -> Callable[..., bytes]:
    """``picture(number, size=, mode=, format=)``: the bytes of an image."""
    return picture


def picture(number: int, *, size: tuple[int, int] = (20, 18), mode: str = "RGB", format: str = "JPEG") -> bytes:
    """Low-frequency noise that no other number has."""
    coarse = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode).save(buffer, format=format)
    return buffer.getvalue()


@pytest.fixture(scope="session", name="write_shard")
def write_shard_fixture() -> Callable[..., None]:
    """``write_shard(path, numbers, label=)``: a tar of these pictures, of four classes or as ``label(number)`` says."""
    return write_shard


def write_shard(path: Path, numbers: range, label: Callable[[int], int] = lambda number: number % 4) -> None:
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            for extension, content in (("jpg", picture(number)), ("cls", str(label(number)).encode())):
                info = tarfile.TarInfo(f"{number:04}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three train shards of 20 and a test shard of 16 samples."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        write_shard(folder / f"train-{shard}.tar", range(20 * shard, 20 * shard + 20))
    write_shard(folder / "test-0.tar", range(60, 76))
    return folder
