"""The ledger: which sample stood at which position of the run, written as it is trained on, so that a run can be audited.

Each process appends a line for each of its micro-batches to a file of its own. A run that is continued first drops the lines at
and after its checkpoint, in the files of however many processes there were, so what remains was trained on exactly once.
Keys are those wanted; where an image could not be used, ``served`` says which one stood in for it.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from vitssl.task import Batch


class Ledger:
    """Appends to ``folder/process_00000.jsonl``. Whoever opens it has called :func:`cut` before, in one process."""

    def __init__(self, folder: Path, *, process: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / f"process_{process:05}.jsonl", "a")  # noqa: SIM115 (it lives as long as the run)

    def write(self, batch: Batch) -> None:
        """Positions and keys of a micro-batch, in the file at once: a killed process has written what it trained on."""
        row = {"positions": batch.positions.tolist(), "keys": batch.keys}
        row |= {"served": {bad.position: bad.served for bad in batch.bad}} if batch.bad else {}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def cut(folder: Path, position: int) -> None:
    """Drop every line at or after a position of the run, and lines that a killed process left half-written."""
    for path in folder.glob("process_*.jsonl"):
        kept = [line for line, row in _rows(path) if row["positions"][0] < position]
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)


def read(folder: Path) -> Iterator[tuple[int, str]]:
    """(position, key) of everything that was trained on, file by file."""
    for path in sorted(folder.glob("process_*.jsonl")):
        for _, row in _rows(path):
            yield from zip(row["positions"], row["keys"], strict=True)


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    with open(path) as file:
        for line in file:
            try:
                yield line, json.loads(line)
            except ValueError:
                return  # the end of a process that was killed
