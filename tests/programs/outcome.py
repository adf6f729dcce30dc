"""What several tests ask of a run that has ended, or of the folder it left."""

import importlib.util
import shutil
from pathlib import Path

import pytest

COMPILER = shutil.which("c++") or shutil.which("g++")  # DeepSpeed compiles an operation
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or COMPILER is None, reason="deepspeed or a C++ compiler is not here"
)
WAIT = ("init.head_warmup=6", "length=10", "optim.warmup=2", "optim.clip=1.0", "checkpoint.every=1", "checkpoint.keep_last=99")


def refused(run, *words: str, lines: int = 1) -> None:
    assert run.codes == [2], run.out + run.err
    assert run.err.startswith("error: ") and run.err.count("\n") <= lines and "Traceback" not in run.err + run.out
    for word in words:
        assert word in run.err


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def equal_bits(tensors: dict, encoder: dict) -> bool:
    """Whether the encoder of a checkpoint is this one, bit for bit."""
    return all(tensors[f"state/encoder.vit.{name}"].equal(tensor) for name, tensor in encoder.items())
