"""Features of a frozen encoder, kept in files that every protocol reads: extracted once, continued where it was stopped.

A set's features lie in a folder named by the weights, the data and the view, one ``.npy`` a kind, memory-mapped, a row an
image in the order of the data. ``KIND.done.npy`` says of each image whether its row is written (1) or not (0), so another
number of processes can go on, and what could not be read is tried again by the next run. All processes map the same files.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from vitssl import dist
from vitssl.data.augment import Normalize
from vitssl.data.feed import evaluation_samples
from vitssl.data.loader import evaluation_batches
from vitssl.data.sources import Source, stamp
from vitssl.errors import CheckpointError, DataError
from vitssl.models.encoder import Encoder
from vitssl.models.state import digest_of
from vitssl.sections import DataConfig
from vitssl.task import Batch
from vitssl.train.layers import Feature
from vitssl.views import View

_FLUSH = 64  # batches between two times that what is there is written down


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


@torch.inference_mode()
def extracted(
    encoder: Encoder,
    source: Source,
    config: DataConfig,
    how: Extraction,
    features: Sequence[Feature],
    *,
    positions: NDArray[np.int64],
) -> Iterator[tuple[Batch, dict[Feature, Tensor]]]:
    """For each ``how.batch_size`` of ``positions``, in order: the batch without images that cannot be used (it says which
    those are, and may be empty), and its rows on the host. A view with a random crop shows an image the same one every time.
    """
    encoder = encoder.to(how.device).eval()
    spec = encoder.spec
    normalize = Normalize(how.mean, how.std, channels=spec.channels).to(how.device)
    samples = evaluation_samples(source, config, [how.view], channels=spec.channels)
    options = {"batch_size": how.batch_size, "world": dist.world(), "workers": how.workers}
    blocks = max(feature.blocks(spec) for feature in features)
    for batch in evaluation_batches(samples, positions=positions, **options):
        images = normalize(batch.views[how.view].to(how.device, non_blocking=True))
        with torch.autocast(how.device, torch.bfloat16) if how.precision == "bf16" else nullcontext():
            tokens = encoder(images, last_blocks=blocks) if len(batch) else None
            rows = {feature: feature.of(encoder, tokens) if tokens else images.new_empty(0) for feature in features}
        yield batch, {feature: values.cpu() for feature, values in rows.items()}


def frozen_features(
    encoder: Encoder,
    source: Source,
    config: DataConfig,
    how: Extraction,
    kinds: Sequence[str],
    *,
    folder: Path,
    tell: Callable[[str], None],
    weights: str | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """({kind: memory-mapped [N, ...]}, rows [M] of the images that could be used), extracted as far as they are not there.

    ``tell`` gets a line of what is done; ``weights`` is the encoder's digest where it is known. Raises DataError
    where no image can be used, CheckpointError where the encoder's numbers are none.
    """
    place = folder / _key(weights or digest_of(encoder.state()), encoder, source, config, how)
    features = {kind: Feature(kind) for kind in kinds}
    files = {kind: _file(place, each, encoder, source.num_samples) for kind, each in features.items()}
    flags = {kind: _flags(place, kind, source.num_samples) for kind in kinds}
    pending = np.flatnonzero(np.any([flag == 0 for flag in flags.values()], axis=0))
    dist.barrier()  # nobody writes before all have seen what is to be done
    if len(pending):
        done = source.num_samples - len(pending)
        tell(f"{source.num_samples:,} images of {source.name}: {len(pending):,} to look at, {done:,} in {place}")
        mine = pending[dist.rank() :: dist.world()]
        bad = _fill(files, flags, extracted(encoder, source, config, how, list(features.values()), positions=mine))
        if bad := dist.gather_lists(bad):
            tell(f"{len(bad):,} images of {source.name} left out; the first: {bad[0]}")
    dist.barrier()
    used = np.all([_flags(place, kind, source.num_samples) == 1 for kind in kinds], axis=0)
    if not used.any():
        raise DataError(f"{source.name}: none of {source.num_samples:,} images can be used; look at them with vitssl check")
    return files, np.flatnonzero(used)


def mapped(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A file of zeros that the first process makes where none is there that is whole, mapped by all."""
    if dist.rank() == 0 and not _whole(path, dtype, shape):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        open_memmap(temporary, mode="w+", dtype=dtype, shape=shape).flush()
        temporary.replace(path)
    dist.barrier()
    return open_memmap(path, mode="r+")


def _fill(
    files: dict[str, np.ndarray], flags: dict[str, np.ndarray], found: Iterator[tuple[Batch, dict[Feature, Tensor]]]
) -> list[str]:
    """Write rows as they come, and mark them; returns why others could not be used."""
    written, bad = [np.empty(0, dtype=np.int64)], []
    for number, (batch, values) in enumerate(found, start=1):
        bad += [each.reason for each in batch.bad]
        rows = batch.positions.numpy()
        for feature, own in values.items() if len(rows) else ():
            file = files[feature.name]
            with np.errstate(over="ignore"):
                numbers = own.float().numpy().astype(file.dtype)
            if not np.isfinite(numbers).all():
                raise CheckpointError(
                    f"the encoder makes no finite numbers of {batch.keys[0]} and others ({feature.name} features); its weights"
                    " are damaged, or are not of this network, or precision=bf16 is too coarse for them"
                )
            file[rows] = numbers
        written.append(rows)
        if number % _FLUSH == 0:
            _mark(files, flags, np.concatenate(written))
            del written[1:]
    _mark(files, flags, np.concatenate(written))
    return bad


def _mark(files: dict[str, np.ndarray], flags: dict[str, np.ndarray], rows: np.ndarray) -> None:
    """Say of rows that they are written, once they are on the disk."""
    for file in files.values():
        file.flush()
    for flag in flags.values():
        flag[rows] = 1
        flag.flush()


def _file(place: Path, feature: Feature, encoder: Encoder, num: int) -> np.ndarray:
    """Patch tokens are many: they are kept in float16."""
    path, dtype = place / f"{feature.name}.npy", np.float16 if feature.kind == "patches" else np.float32
    shape = (num, *feature.shape(encoder.spec))
    if dist.rank() == 0 and not _whole(path, dtype, shape):
        path.with_suffix(".done.npy").unlink(missing_ok=True)  # or zeros would pass for features
    return mapped(path, dtype, shape)


def _whole(path: Path, dtype: Any, shape: tuple[int, ...]) -> bool:
    """Whether a file is there that holds such an array; opened for writing, a shorter one would be filled up with zeros."""
    try:
        found = open_memmap(path, mode="r")
    except (OSError, ValueError):
        return False
    return found.dtype == dtype and found.shape == shape


def _flags(place: Path, kind: str, num: int) -> np.ndarray:
    return mapped(place / f"{kind}.done.npy", np.uint8, (num,))


def _key(weights: str, encoder: Encoder, source: Source, config: DataConfig, how: Extraction) -> str:
    """What features depend on: the network and its weights, the data and how it is decoded, the view, what images become."""
    said = [
        weights,
        *network(encoder),
        source.fingerprint,
        stamp(source),
        source.num_samples,
        config.exif,
        config.arrays,
        config.max_pixels,
    ]
    said += [repr(how.view), list(how.mean), list(how.std), how.precision]
    return hashlib.blake2b(json.dumps(said).encode(), digest_size=12).hexdigest()


def network(encoder: Encoder) -> list[str]:
    """What an encoder computes beside its weights: heads, activations and epsilons are in no tensor."""
    return [encoder.architecture, repr(sorted(encoder.arguments.items())), repr(encoder.spec), encoder.pos_resample]
