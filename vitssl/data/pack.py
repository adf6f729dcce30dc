"""Packs any source into balanced tar shards: shuffled, resized if asked, resumable, with a report of duplicates.

Which sample goes into which shard is a function of (source, seed, shard size), so a pack that was interrupted goes on with the
shards that are missing, and the same command makes the same bytes. Surprising: images that need no resize are copied byte by
byte; nothing is decoded and encoded again without a reason.
"""

import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray

from vitssl import draws
from vitssl.data import transforms
from vitssl.data.arrays import is_npy
from vitssl.data.index import build_index
from vitssl.data.manifest import index_shards
from vitssl.data.pool import side_by_side
from vitssl.data.sources import Raw, Source
from vitssl.data.tarscan import IMAGES
from vitssl.data.tarwrite import write_shard
from vitssl.errors import ConfigError, DataError
from vitssl.views import purpose

_SEEN = ".pack"  # what is known of each shard while the pack is not finished
_BANDS = 4  # of 16 bits: two perceptual hashes that differ in at most 3 bits share one


@dataclass(frozen=True)
class PackConfig:
    """``short_side`` and ``max_side`` in pixels only ever shrink; ``quality`` of the JPEG that a resized image becomes."""

    name: str = "train"
    shard_bytes: int = 256 << 20
    short_side: int | None = None
    max_side: int | None = None
    quality: int = 90
    seed: int = 0
    shuffle: bool = True
    perceptual: bool = False


def pack(
    source: Source,
    folder: Path,
    config: PackConfig,
    *,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Write ``folder/NAME-000000.tar`` and so on, their index, and the reports; returns counts.

    ``NAME.pack.json`` says what was asked and, in the end, the counts; ``NAME.duplicates.jsonl`` lists groups of equal images,
    ``NAME.bad.jsonl`` those that could not be resized and are left out; ``about.json`` names the classes. Raises ConfigError
    where the folder holds another pack of this name, DataError where the source cannot be read.
    """
    shards = _divide(source, config)
    plan = {"format": 1, "source": source.fingerprint, "samples": source.num_samples, "shards": len(shards), **asdict(config)}
    finished = _begin(folder, plan, source)
    if finished is not None:
        return finished
    paths = [folder / f"{config.name}-{number:06}.tar" for number in range(len(shards))]
    missing = [number for number, path in enumerate(paths) if not (path.exists() and _seen(path).exists())]
    if progress is not None:
        progress(len(shards) - len(missing), len(shards))
    work = partial(_write, source, config)
    for done, _ in enumerate(side_by_side(work, [(paths[number], shards[number]) for number in missing], processes), start=1):
        if progress is not None:
            progress(len(shards) - len(missing) + done, len(shards))
    counts = _report(folder, paths, config)
    counts["samples"] = int(index_shards([str(path) for path in paths]).rows["samples"].sum())
    counts |= {"shards": len(shards)}
    (folder / f"{config.name}.pack.json").write_text(json.dumps(plan | {"finished": counts}, indent=1) + "\n")
    shutil.rmtree(folder / _SEEN)
    return counts


def _divide(source: Source, config: PackConfig) -> list[NDArray[np.int64]]:
    """The ids of each shard: as many shards as their size asks for by the mean of 500 images, all of one length or one more."""
    num = source.num_samples
    some = np.unique(np.linspace(0, num - 1, 500).astype(np.int64))
    sizes = [_resized_bytes(raw, config) for raw in source.read(some.tolist())]
    number = min(num, max(1, round(num * (np.mean(sizes) + 1536) / config.shard_bytes)))  # a tar's headers and padding
    order = draws.permutation(config.seed, purpose("pack"), num).numpy() if config.shuffle else np.arange(num)
    return np.array_split(order, number)


def _resized_bytes(raw: Raw, config: PackConfig) -> int:
    try:
        return len(_shrunk(raw, config)[1])
    except DataError:
        return len(raw.image)


def _begin(folder: Path, plan: dict, source: Source) -> dict[str, int] | None:
    """Write down what is asked; the counts of a pack that is finished, None for one to be done."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{plan['name']}.pack.json"
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except ValueError:
            found = {}
        differing = [key for key in plan if found.get(key) != plan[key]]
        if differing:
            raise ConfigError(
                f"{path} is of another pack ({', '.join(differing)} differ); give another folder or --name, or remove this one"
            )
        if "finished" in found:
            return found["finished"]
    elif any(folder.glob(f"{plan['name']}-*.tar")):
        raise ConfigError(f"{folder} holds {plan['name']}-*.tar that no pack wrote; give another folder or --name")
    if source.classes:
        _name_classes(folder / "about.json", source)
    path.write_text(json.dumps(plan, indent=1) + "\n")
    (folder / _SEEN).mkdir(exist_ok=True)
    return None


def _name_classes(path: Path, source: Source) -> None:
    """Labels are numbers in a tar: all packs of a folder must number the same classes alike."""
    about = {"classes": list(source.classes)}
    if path.exists() and json.loads(path.read_text()).get("classes") != about["classes"]:
        raise ConfigError(f"{path} names other classes than {source.name}; pack it into another folder")
    path.write_text(json.dumps(about, indent=1) + "\n")


def _seen(path: Path) -> Path:
    return path.parent / _SEEN / f"{path.stem}.json"


def _write(source: Source, config: PackConfig, task: tuple[Path, NDArray[np.int64]]) -> None:
    """One shard, its sidecar, and the hashes of what it holds."""
    torch.set_num_threads(1)
    path, ids = task
    seen, bad = [], []

    def samples() -> Iterator[dict[str, str | bytes]]:
        for number in ids.tolist():
            (raw,) = source.read([number])
            try:
                extension, content, pixels = _shrunk(raw, config)
            except DataError as error:
                bad.append({"key": raw.key, "reason": str(error)})
                continue
            seen.append([raw.key, hashlib.blake2b(raw.image, digest_size=16).hexdigest(), _looks(pixels, raw, config)])
            label = {} if raw.label is None else {"cls": str(raw.label).encode()}
            yield {"__key__": f"{number:09}", extension: content, **label}

    write_shard(path, samples())
    if not seen:
        raise DataError(f"{path}: none of its {len(bad):,} images can be used; the first: {bad[0]['reason']}")
    build_index(str(path))
    temporary = _seen(path).with_suffix(".tmp")
    temporary.write_text(json.dumps({"seen": seen, "bad": bad}))
    temporary.rename(_seen(path))


def _shrunk(raw: Raw, config: PackConfig) -> tuple[str, bytes, transforms.Pixels | None]:
    """(extension, encoded image, its pixels if they were decoded). DataError for one that must be decoded and cannot be,
    ConfigError for an array that is not to be copied as it is."""
    if raw.problem:
        raise DataError(raw.problem)
    extension = raw.where.split(" (byte")[0].rpartition(".")[2].lower()
    extension = extension if extension in IMAGES else transforms.extension(raw)  # a row of a table, a name that says nothing
    resizing = config.short_side is not None or config.max_side is not None
    if (resizing or config.perceptual) and is_npy(raw.image):
        raise ConfigError(
            f"{raw.where}: is an array, and pictures alone are resized or compared by their looks;"
            " without --short-side, --max-side and --perceptual it is packed as it is"
        )
    if not resizing:
        return extension, raw.image, None
    pixels = transforms.decode(raw)
    height, width = pixels.shape[:2]
    factor = min(
        1.0,
        (config.short_side or min(height, width)) / min(height, width),
        (config.max_side or max(height, width)) / max(height, width),
    )
    if factor == 1.0:
        return extension, raw.image, pixels
    size = max(1, round(height * factor)), max(1, round(width * factor))
    pixels = np.ascontiguousarray(transforms.resized(pixels, *size, "bicubic"))
    return "jpg", simplejpeg.encode_jpeg(pixels, quality=config.quality, colorspace="RGB", colorsubsampling="420"), pixels


def _looks(pixels: transforms.Pixels | None, raw: Raw, config: PackConfig) -> str | None:
    """64 bits of how an image looks (difference hash: is each of 8 x 8 cells darker than its right neighbour), in hex."""
    if not config.perceptual:
        return None
    pixels = transforms.decode(raw) if pixels is None else pixels
    small = transforms.resized(pixels, 8, 9, "bilinear").astype(np.float32).mean(axis=2)
    return np.packbits(small[:, 1:] > small[:, :-1]).tobytes().hex()


def _report(folder: Path, paths: list[Path], config: PackConfig) -> dict[str, int]:
    """Write the lists of duplicates and of images left out; (how many of each)."""
    found = [json.loads(_seen(path).read_text()) for path in paths]
    seen = [entry for each in found for entry in each["seen"]]
    bad = [entry for each in found for entry in each["bad"]]
    exact: dict[str, list[str]] = defaultdict(list)
    for key, content, _ in seen:
        exact[content].append(key)
    groups = [{"kind": "exact", "keys": sorted(keys)} for keys in exact.values() if len(keys) > 1]
    if config.perceptual:
        groups += [{"kind": "alike", "keys": sorted(keys)} for keys in _alike([(key, bits) for key, _, bits in seen])]
    for name, rows in (("duplicates", groups), ("bad", bad)):
        (folder / f"{config.name}.{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    extra = [len(group["keys"]) - 1 for group in groups if group["kind"] == "exact"]
    return {"duplicates": sum(extra), "alike": sum(group["kind"] == "alike" for group in groups), "bad": len(bad)}


def _alike(hashes: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Pairs of images whose hashes differ in at most 3 of 64 bits."""
    values = np.array([int(bits, 16) for _, bits in hashes], dtype=np.uint64)
    told: set[tuple[int, int]] = set()
    for band in range(_BANDS):
        cells: dict[int, list[int]] = defaultdict(list)
        for number, cell in enumerate(((values >> np.uint64(16 * band)) & np.uint64(0xFFFF)).tolist()):
            cells[cell].append(number)
        for members in cells.values():
            own = values[members]
            for place, one in enumerate(members[:-1]):
                near = np.bitwise_count(own[place + 1 :] ^ values[one]) <= 3
                told |= {(one, members[place + 1 + int(other)]) for other in np.flatnonzero(near)}
    yield from sorted((hashes[one][0], hashes[other][0]) for one, other in told)
