"""A folder of features of a source's images, written in pieces by any number of processes: killed, it goes on.

The data are cut into pieces of so many images, whole batches of them, and a process takes whole pieces. So each batch holds the
same images however many processes there are and wherever they were stopped, and the files are the same bit for bit (on one
kind of device, with as many threads). A piece that is written has a record in ``.unfinished/``; when all have,
``about.json`` says what the folder holds. An image that cannot be used is left out of tables and tars; ``features.npy`` has a
row for every image of the data, and there it is not a number. Both are counted, told, and listed with the reason.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitssl import dist
from vitssl.data.featurewrite import FORMATS, Rows, require_format, settle
from vitssl.data.sources import Source, same_samples, stamp
from vitssl.data.sources.base import printable
from vitssl.errors import ConfigError, DataError
from vitssl.models.encoder import Encoder
from vitssl.sections import DataConfig
from vitssl.task import Bad, Batch
from vitssl.train.frozen import Extraction, extracted, mapped, network
from vitssl.train.layers import Feature

_PIECES, _MOST_ROWS, _MOST_BYTES = 256, 10_000, 256 << 20  # a few hundred files where there is a choice, none of them large


@dataclass(frozen=True)
class Output:
    """``format`` is parquet, npy or webdataset; ``half``: float16; ``rows``: images of a piece, rounded up to whole batches
    (None: chosen)."""

    folder: Path
    format: str
    half: bool = False
    rows: int | None = None


@dataclass(frozen=True)
class Embedding:
    """Which features of which images go where; ``weights`` is the encoder's :func:`vitssl.train.frozen.weights_hash`."""

    encoder: Encoder
    weights: str
    source: Source
    config: DataConfig
    how: Extraction
    features: Sequence[Feature]
    output: Output

    def write(
        self, *, tell: Callable[[str], None], progress: Callable[[int, int], None], facts: dict[str, Any]
    ) -> dict[str, Any]:
        """Write what is not there yet; on every process what ``about.json`` says, which holds ``facts`` too.

        ``progress(done, all)`` counts this process's images. Raises ConfigError for a folder that holds something else,
        DataError where images cannot be had because of the network, or none can be used.
        """
        require_format(self.output.format)
        settings = self._settings()
        _refuse_another(self.output.folder, settings)
        dist.barrier()
        if _about(self.output.folder) is None:
            if dist.rank() == 0:
                _write_json(self._unfinished / "settings.json", settings)
            starts, num = range(0, self.source.num_samples, self.rows), self.source.num_samples
            pieces = [np.arange(start, min(start + self.rows, num)) for start in starts]
            pending = [number for number in range(len(pieces)) if not self._record(number).exists()]
            dist.barrier()  # nobody writes before all have seen what is to be done
            if len(pending) < len(pieces):
                there = num - sum(len(pieces[number]) for number in pending)
                tell(f"going on: {there:,} of {num:,} images are in {self.output.folder}")
            if pending:  # else arrays may have their names already
                self._write({number: pieces[number] for number in pending[dist.rank() :: dist.world()]}, progress)
            dist.barrier()
            if dist.rank() == 0:
                self._finish({"settings": settings, **facts}, len(pieces))
            dist.barrier()
        about = _about(self.output.folder)
        if not about["rows"]:
            raise DataError(f"{self.source.name}: none of {about['images']:,} images can be used; see {self.output.folder}")
        if left := about["left_out"]:
            tell(f"{len(left):,} images of {self.source.name} left out; the first: {left[0]['reason']}")
        return about

    @property
    def rows(self) -> int:
        """Images of a piece: whole batches."""
        size = self.how.batch_size
        bytes_each = sum(math.prod(feature.shape(self.encoder.spec)) for feature in self.features) * self._dtype().itemsize
        chosen = min(_MOST_ROWS, -(-self.source.num_samples // _PIECES), max(1, _MOST_BYTES // bytes_each))
        return -(-(self.output.rows or chosen) // size) * size

    @property
    def _unfinished(self) -> Path:
        """Where records lie, and files that have no name yet."""
        return self.output.folder / ".unfinished"

    def _record(self, number: int) -> Path:
        return self._unfinished / f"{number:05}.json"

    def _dtype(self) -> np.dtype:
        return np.dtype(np.float16 if self.output.half else np.float32)

    def _settings(self) -> dict[str, Any]:
        """What the files depend on."""
        how = self.how
        return {
            "weights": self.weights,
            "network": network(self.encoder),
            "data": self.source.fingerprint,
            "files": stamp(self.source),
            "features": [feature.name for feature in self.features],
            "format": self.output.format,
            "dtype": self._dtype().name,
            "view": repr(how.view),
            "mean": list(how.mean),
            "std": list(how.std),
            "decoded": [self.config.exif, self.config.arrays, self.config.max_pixels],
            "precision": how.precision,
            "device": how.device,
            "batch_size": how.batch_size,
            "rows": self.rows,
        }

    def _write(self, pieces: dict[int, np.ndarray], progress: Callable[[int, int], None]) -> None:
        """These pieces, each with its record once it is on the disk."""
        files = self._maps()
        positions = np.concatenate([np.empty(0, dtype=np.int64), *pieces.values()])
        options = {"positions": positions}
        found = extracted(self.encoder, self.source, self.config, self.how, self.features, **options) if pieces else iter(())
        done = 0
        for number, piece in pieces.items():
            rows, left = self._next(found, -(-len(piece) // self.how.batch_size))
            self._refuse_network(left, len(piece))
            record = {"rows": len(rows.keys), "left_out": [{"key": printable(bad.key), "reason": bad.reason} for bad in left]}
            if files:
                for name, file in files.items():
                    file[piece] = np.nan
                    file[rows.numbers] = rows.features[name]
                    file.flush()
                keys = dict(zip(rows.numbers.tolist(), rows.keys, strict=True)) | {bad.position: bad.key for bad in left}
                record["keys"] = [printable(keys[place]) for place in piece.tolist()]
            else:
                ending, write = FORMATS[self.output.format]
                name = f"part-{number:05}.{ending}"
                write(self._unfinished / name, rows)
                settle(self._unfinished / name, self.output.folder / name)
            _write_json(self._record(number), record)
            done += len(piece)
            progress(done, len(positions))

    def _next(self, found: Iterator, batches: int) -> tuple[Rows, list[Bad]]:
        """(rows, what cannot be used) of so many batches."""
        parts: list[Batch] = []
        empty = {each: np.empty((0, *each.shape(self.encoder.spec)), self._dtype()) for each in self.features}
        values = {feature: [none] for feature, none in empty.items()}
        for _ in range(batches):
            batch, own = next(found)
            parts.append(batch)
            for feature in self.features if len(batch) else ():
                values[feature].append(_narrowed(own[feature].float().numpy(), feature, self._dtype()))
        numbers, labels = np.concatenate([batch.positions.numpy() for batch in parts]), self.source.label_array()
        keys = [printable(key) for batch in parts for key in batch.keys]
        joined = {feature.name: np.concatenate(own) for feature, own in values.items()}
        rows = Rows(numbers, keys, None if labels is None else labels[numbers], joined)
        return rows, [bad for batch in parts for bad in batch.bad]

    def _maps(self) -> dict[str, np.ndarray]:
        """``features.npy`` (``features_NAME.npy`` where there are several) by features' names; nothing for other formats."""
        if self.output.format != "npy":
            return {}
        return {
            feature.name: mapped(
                self._unfinished / name, self._dtype(), (self.source.num_samples, *feature.shape(self.encoder.spec))
            )
            for feature, name in zip(self.features, self._npy_names(), strict=True)
        }

    def _npy_names(self) -> list[str]:
        names = [feature.name for feature in self.features]
        return ["features.npy"] if len(names) == 1 else [f"features_{name}.npy" for name in names]

    def _refuse_network(self, left: list[Bad], images: int) -> None:
        """Images that the network or the moment withholds are no reason for files without them."""
        passing = [bad for bad in left if bad.passing]
        if len(passing) > self.config.max_bad_fraction * images:
            raise DataError(
                f"{len(passing):,} of {images:,} images cannot be had now ({passing[0].reason}), more than"
                f" data.max_bad_fraction={self.config.max_bad_fraction:g}; mend that, and the same command goes on"
            )

    def _finish(self, facts: dict[str, Any], num_pieces: int) -> None:
        """Give files their names and say what they hold. Stopped anywhere in here, it is done again."""
        records = [json.loads(self._record(number).read_text()) for number in range(num_pieces)]
        if self.output.format == "npy":
            for name in self._npy_names():
                if (self._unfinished / name).exists():
                    settle(self._unfinished / name, self.output.folder / name)
            keys = "".join(f"{key}\n" for record in records for key in record["keys"])
            (self.output.folder / "keys.txt").write_text(keys)
            if (labels := self.source.label_array()) is not None:
                np.save(self.output.folder / "labels.npy", labels)
        counts = {"images": self.source.num_samples, "rows": sum(record["rows"] for record in records)}
        left = [each for record in records for each in record["left_out"]]
        classes = list(self.source.classes) if self.source.classes else None
        _write_json(self.output.folder / "about.json", facts | counts | {"classes": classes, "left_out": left})
        shutil.rmtree(self._unfinished)


def _narrowed(values: np.ndarray, feature: Feature, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        narrow = values.astype(dtype)
    if np.isinf(narrow).any() and not np.isinf(values).any():
        raise ConfigError(f"dtype=fp16: {feature.name} reaches {np.abs(values).max():,.0f}, and fp16 ends at 65,504; take fp32")
    return narrow


def _about(folder: Path) -> dict[str, Any] | None:
    """What a finished folder says of itself."""
    path = folder / "about.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _refuse_another(folder: Path, settings: dict[str, Any]) -> None:
    """Raise ConfigError where the folder holds other features, or anything else."""
    begun = folder / ".unfinished" / "settings.json"
    there = (_about(folder) or {}).get("settings") or (json.loads(begun.read_text()) if begun.is_file() else None)
    if there is None:
        if folder.exists() and any(each.name != begun.parent.name for each in folder.iterdir()):
            raise ConfigError(f"out={folder}: holds other files; name a new folder")
        return
    differ = [key for key in settings if key != "data" and settings[key] != there.get(key)]
    differ += [] if same_samples(there.get("data", ""), settings["data"]) else ["data"]
    if differ:
        told = ", ".join(f"{key} {there.get(key)} (now {settings[key]})" for key in differ[:3])
        raise ConfigError(f"out={folder}: was begun with other settings: {told}; name another folder, or delete it")


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    settle(temporary, path)
