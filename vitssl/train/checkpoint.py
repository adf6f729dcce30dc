"""Checkpoints: named fp32 tensors in safetensors and a JSON manifest with checksums, the same under every engine.

A checkpoint is a folder ``step_00012500`` that is written under a temporary name, synced and renamed, so it is either whole
or absent. Only safetensors and JSON are read back; nothing unpickles. One damaged on disk is detected by its checksums.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitssl.errors import CheckpointError

FORMAT = 1
SHARD_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds: ``state`` of the task, the optimiser's ``moments`` ("exp_avg/NAME"), and plain ``facts``."""

    step: int
    state: dict[str, Tensor]
    moments: dict[str, Tensor]
    facts: dict[str, Any]


def save(root: Path, saved: Saved) -> Path:
    """Write ``root/step_N`` atomically and point LATEST at it. Raises CheckpointError where the disk is full."""
    final, temporary = root / _name(saved.step), root / f".writing_{_name(saved.step)}_{os.getpid()}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tensors = {f"state/{name}": tensor for name, tensor in saved.state.items()}
        tensors |= {f"moments/{name}": tensor for name, tensor in saved.moments.items()}
        files = {}
        for number, shard in enumerate(_shards(tensors)):
            path = temporary / f"tensors_{number:05}.safetensors"
            save_file({name: tensor.detach().contiguous().cpu() for name, tensor in shard.items()}, path)
            files[path.name] = {"sha256": _digest(path), "bytes": path.stat().st_size, "tensors": len(shard)}
            _sync(path)
        manifest = {"format": FORMAT, "step": saved.step, "facts": saved.facts, "files": files}
        _write(temporary / "manifest.json", json.dumps(manifest | {"sha256": _own_digest(manifest)}, indent=1))
        for name in files:  # safetensors lets nobody but the owner read; the run's other files are the team's
            (temporary / name).chmod((temporary / "manifest.json").stat().st_mode)
        _sync(temporary)
        if final.exists():  # it was found damaged and the run has come past it again
            shutil.rmtree(final)
        os.rename(temporary, final)
        _sync(root)
        _write(root / "LATEST.tmp", final.name)
        os.replace(root / "LATEST.tmp", root / "LATEST")
        _sync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = [path.name for path in found(root)]
        rest = f"the newest whole checkpoint is {kept[-1]}" if kept else "no earlier checkpoint exists"
        raise CheckpointError(
            f"checkpoint {final} could not be written: {_reason(error)}; {rest}; free space and run the same command to go on"
        ) from error
    return final


def load(folder: Path) -> Saved:
    """Read a checkpoint back on the CPU. Raises CheckpointError naming the file that is missing or damaged."""
    manifest = read_manifest(folder)
    tensors: dict[str, Tensor] = {}
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != facts["bytes"] or _digest(path) != facts["sha256"]:
            raise CheckpointError(f"{path} is damaged: its checksum is not the one in manifest.json")
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is no safetensors file ({_reason(error)})") from None
    split: dict[str, dict[str, Tensor]] = {"state": {}, "moments": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        split[part][rest] = tensor
    return Saved(step=manifest["step"], facts=manifest["facts"], **split)


def load_newest(root: Path, *, tell: Callable[[str], None]) -> Saved | None:
    """The newest whole checkpoint below ``root``, or None; each damaged one is named through ``tell`` and passed over."""
    candidates = found(root)
    for folder in reversed(candidates):
        try:
            return load(folder)
        except CheckpointError as error:
            tell(f"{error}; using the checkpoint before it")
    if candidates:
        raise CheckpointError(
            f"none of the {len(candidates)} checkpoints in {root} is whole; remove the folder to start afresh"
        )
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest, which carries its own checksum. Raises CheckpointError: absent, damaged, of another format."""
    path = folder / "manifest.json"
    try:
        manifest = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({_reason(error)})") from None
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {manifest.get('format')}, this program reads {FORMAT}")
    if manifest.pop("sha256", None) != _own_digest(manifest):
        raise CheckpointError(f"{path} is damaged: its checksum is not the one it carries")
    return manifest


def found(root: Path) -> list[Path]:
    """The checkpoint folders below ``root``, oldest first."""
    folders = root.iterdir() if root.is_dir() else ()
    return sorted((path for path in folders if re.fullmatch(r"step_\d{8,}", path.name)), key=_step)


def steps(root: Path) -> list[int]:
    """The steps of the checkpoints below ``root``, whole or not."""
    return [_step(folder) for folder in found(root)]


def prune(root: Path, *, newest: int, keep_last: int, keep_every: int | None, damaged: Collection[int] = ()) -> None:
    """Remove all but the ``keep_last`` newest up to step ``newest`` and the first at or after each multiple of ``keep_every``.

    Those of the steps ``damaged`` take no whole one's place: they stay until a later one has been written, then they go.
    """
    folders = [folder for folder in found(root) if _step(folder) <= newest]
    for folder in [folder for folder in folders if _step(folder) in damaged]:
        folders.remove(folder)
        shutil.rmtree(folder)
    firsts = {_step(folder) // keep_every: folder for folder in reversed(folders)} if keep_every else {}
    kept = {*folders[-keep_last:], *(folder for multiple, folder in firsts.items() if multiple)}
    for folder in folders:
        if folder not in kept:
            shutil.rmtree(folder)
    for leftover in root.glob(".writing_*"):
        shutil.rmtree(leftover, ignore_errors=True)


def discard(root: Path, *, after: int) -> None:
    """Remove the checkpoints of later steps than ``after``."""
    for folder in found(root):
        if _step(folder) > after:
            shutil.rmtree(folder)


def _name(step: int) -> str:
    return f"step_{step:08}"


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _shards(tensors: dict[str, Tensor]) -> Iterable[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.clone() if tensor._is_view() else tensor
        size += tensor.nbytes
    if shard:
        yield shard


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).splitlines()[0]
