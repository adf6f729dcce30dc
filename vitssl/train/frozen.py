"""Features of a frozen encoder, kept in files that every protocol reads: extracted once, continued where it was stopped.

A set's features lie in a folder named by the weights, the data and the view, one ``.npy`` a kind, memory-mapped, a row an
image in the order of the data. ``KIND.done.npy`` says of each image whether its row is written (1), cannot be (2), or is to
come (0), so another number of processes can go on. All processes map the same files.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from vitssl import dist
from vitssl.data.augment import Normalize
from vitssl.data.feed import evaluation_samples
from vitssl.data.loader import evaluation_batches
from vitssl.data.sources import Source, Subset
from vitssl.errors import DataError
from vitssl.models.encoder import Encoder, Tokens
from vitssl.sections import DataConfig
from vitssl.views import View

_FLUSH = 64  # batches between two times that what is there is written down
_BLOCKS = 4
KINDS: dict[str, Callable[[Encoder, Tokens], Tensor]] = {
    "class": lambda encoder, tokens: tokens.pool("class"),
    "mean": lambda encoder, tokens: tokens.pool("mean"),
    "class_4": lambda encoder, tokens: torch.cat([encoder.norm(block).pool("class") for block in tokens.blocks], dim=1),
    "patches": lambda encoder, tokens: tokens.patches,
}
"""What may be kept of an image: [D], [D], class tokens of the last four blocks [4 D], all patch tokens [N, D] in float16."""


@dataclass(frozen=True)
class Extraction:
    """How images become features. ``precision`` is fp32 or bf16 (autocast); ``mean`` and ``std`` in units of [0, 1]."""

    view: View
    mean: Sequence[float]
    std: Sequence[float]
    device: str = "cpu"
    precision: str = "fp32"
    batch_size: int = 128
    workers: int = 0


def frozen_features(
    encoder: Encoder,
    source: Source,
    config: DataConfig,
    how: Extraction,
    kinds: Sequence[str],
    *,
    folder: Path,
    tell: Callable[[str], None],
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """({kind: memory-mapped [N, ...]}, rows [M] of the images that could be used), extracted as far as they are not there.

    ``tell`` gets a line of what is done. Raises DataError where no image can be used.
    """
    place = folder / _key(encoder, source, how)
    files = {kind: _file(place, kind, encoder, source.num_samples) for kind in kinds}
    flags = {kind: _flags(place, kind, source.num_samples) for kind in kinds}
    pending = np.flatnonzero(np.any([flag == 0 for flag in flags.values()], axis=0))
    if len(pending):
        done = source.num_samples - len(pending)
        tell(f"{source.num_samples:,} images of {source.name}: {len(pending):,} to look at, {done:,} in {place}")
        _extract(encoder, Subset(source, pending), config, how, files, flags, pending=pending, tell=tell)
    dist.barrier()
    used = np.all([_flags(place, kind, source.num_samples) == 1 for kind in kinds], axis=0)
    if not used.any():
        raise DataError(f"{source.name}: none of {source.num_samples:,} images can be used; look at them with vitssl check")
    return files, np.flatnonzero(used)


@torch.inference_mode()
def _extract(
    encoder: Encoder,
    source: Source,
    config: DataConfig,
    how: Extraction,
    files: dict[str, np.ndarray],
    flags: dict[str, np.ndarray],
    *,
    pending: np.ndarray,
    tell: Callable[[str], None],
) -> None:
    """Write this process's part of the pending rows; what cannot be used is marked."""
    encoder = encoder.to(how.device).eval()
    spec = encoder.spec
    normalize = Normalize(how.mean, how.std, channels=spec.channels).to(how.device)
    samples = evaluation_samples(source, config, [how.view], channels=spec.channels)
    fast = torch.autocast(how.device, torch.bfloat16) if how.precision == "bf16" else nullcontext()
    written, bad = [], []
    options = {"batch_size": how.batch_size, "rank": dist.rank(), "world": dist.world(), "workers": how.workers}
    for number, batch in enumerate(evaluation_batches(samples, **options)):
        bad += [each.reason for each in batch.bad]
        images = normalize(batch.views[how.view].to(how.device))
        with fast:
            tokens = encoder(images, last_blocks=min(_BLOCKS, spec.depth) if "class_4" in files else 0)
            rows = pending[batch.positions.numpy()]
            for kind, file in files.items():
                file[rows] = KINDS[kind](encoder, tokens).to(_type(kind)).cpu().numpy()
        written.append(rows)
        if number % _FLUSH == _FLUSH - 1:
            _mark(files, flags, np.concatenate(written), 1)
            written.clear()
    _mark(files, flags, np.concatenate([*written, np.empty(0, dtype=np.int64)]), 1)
    mine = pending[dist.rank() :: dist.world()]
    left = mine[np.any([flag[mine] == 0 for flag in flags.values()], axis=0)]
    _mark(files, flags, left, 2)
    if bad := dist.gather_lists(bad):
        tell(f"{len(bad):,} images of {source.name} left out; the first: {bad[0]}")


def _mark(files: dict[str, np.ndarray], flags: dict[str, np.ndarray], rows: np.ndarray, value: int) -> None:
    """Say of rows what became of them, once they are on the disk."""
    for file in files.values():
        file.flush()
    for flag in flags.values():
        flag[rows] = value
        flag.flush()


def _file(place: Path, kind: str, encoder: Encoder, num: int) -> np.ndarray:
    spec = encoder.spec
    width = {"class_4": min(_BLOCKS, spec.depth) * spec.dim}.get(kind, spec.dim)
    shape = (num, spec.num_patches, width) if kind == "patches" else (num, width)
    return _mapped(place / f"{kind}.npy", np.float16 if kind == "patches" else np.float32, shape)


def _flags(place: Path, kind: str, num: int) -> np.ndarray:
    return _mapped(place / f"{kind}.done.npy", np.uint8, (num,))


def _mapped(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A file of zeros that the first process makes, mapped by all."""
    if dist.rank() == 0 and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        open_memmap(temporary, mode="w+", dtype=dtype, shape=shape).flush()
        temporary.replace(path)
    dist.barrier()
    return open_memmap(path, mode="r+")


def _type(kind: str) -> torch.dtype:
    return torch.float16 if kind == "patches" else torch.float32


def _key(encoder: Encoder, source: Source, how: Extraction) -> str:
    """What features depend on: the weights and their names, the data, the view, the numbers that images become."""
    digest = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(encoder.state().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    said = [source.fingerprint, source.num_samples, repr(how.view), list(how.mean), list(how.std), how.precision]
    digest.update(json.dumps([*said, encoder.pos_resample]).encode())
    return digest.hexdigest()
