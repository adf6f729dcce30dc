"""Files of features with the keys and labels of their images: parquet, and webdataset's tar shards.

A file is whole or not there, and the same rows give the same bytes. Surprising: a sample of a tar is called by the number of
its image in the data, and its key lies beside it as text, because keys may hold dots, which end a sample's name in a tar.
"""

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitssl.data.tarwrite import write_shard
from vitssl.errors import ConfigError


@dataclass(frozen=True)
class Rows:
    """M images: their ``numbers`` in the data, keys, labels [M] where all have one, and features by name, each [M, ...]."""

    numbers: NDArray[np.int64]
    keys: list[str]
    labels: NDArray[np.int64] | None
    features: Mapping[str, NDArray]

    @property
    def named(self) -> dict[str, NDArray]:
        """Features as columns are called: ``features`` where there is one, ``features_NAME`` where there are several."""
        only = len(self.features) == 1
        return {"features" if only else f"features_{name}": values for name, values in self.features.items()}


def write_parquet(path: Path, rows: Rows) -> None:
    """Columns ``key``, ``label`` and the features, as lists of fixed size (of lists, for patch tokens)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"key": pa.array(rows.keys, pa.string())}
    if rows.labels is not None:
        columns["label"] = pa.array(rows.labels)
    for name, values in rows.named.items():
        column = pa.array(values.reshape(-1))
        for side in reversed(values.shape[1:]):
            column = pa.FixedSizeListArray.from_arrays(column, side)
        columns[name] = column
    # numbers like these neither repeat nor compress
    pq.write_table(pa.table(columns), path, compression="none", use_dictionary=False, write_statistics=["key"])


def write_tar(path: Path, rows: Rows) -> None:
    """A sample an image: ``NUMBER.npy`` (``NUMBER.NAME.npy`` where there are several), ``.cls``, and its key in ``.txt``."""
    only = len(rows.features) == 1

    def sample(row: int) -> dict[str, str | bytes]:
        label = {} if rows.labels is None else {"cls": str(rows.labels[row]).encode()}
        arrays = {"npy" if only else f"{name}.npy": _npy(values[row]) for name, values in rows.features.items()}
        return {"__key__": f"{rows.numbers[row]:012}", **arrays, **label, "txt": rows.keys[row].encode()}

    write_shard(path, map(sample, range(len(rows.keys))))


FORMATS: dict[str, tuple[str, Callable[[Path, Rows], None]]] = {
    "parquet": ("parquet", write_parquet),
    "webdataset": ("tar", write_tar),
}
"""How a file's name ends, and what writes it."""


def require_format(name: str) -> None:
    """Raise ConfigError where what writes it is not installed."""
    if name == "parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise ConfigError("format=parquet needs pyarrow, which is not installed; pip install 'vitssl[hub]'") from None


def settle(temporary: Path, path: Path) -> None:
    """Give a file its name once its bytes are on the disk."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _npy(values: NDArray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()
