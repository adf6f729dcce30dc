"""Which column of an Arrow table is the image and which the label: one set of rules for data sets and parquet files.

What the Hugging Face library wrote into a schema says it. Without that, an image is a column of bytes, or a struct of bytes and
path. Surprising: several columns of images are refused, since nobody knows which is meant, but several of class labels are
merely none, since labels are not needed to pretrain.
"""

import json
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vitssl.errors import DataError, first_of

_IMAGES = ("image", "img", "jpg", "png", "webp")  # which of several columns of bytes is meant
_LABELS = ("label", "labels", "cls")


class Columns(NamedTuple):
    """The names of the image and the label column (None: there is none), and of the classes where the schema has them."""

    image: str
    label: str | None
    classes: tuple[str, ...] | None


def find_columns(schema: pa.Schema, *, where: str) -> Columns:
    """The columns of a table. Raises DataError where no column holds images, or several do."""
    kinds = _kinds(schema)
    images = [name for name in schema.names if kinds.get(name, {}).get("_type") == "Image" and _holds_bytes(schema, name)]
    if not images:
        images = [name for name in schema.names if _holds_bytes(schema, name)]
        named = [name for name in images if name.lower() in _IMAGES]
        images = named if len(images) > 1 and named else images
    if not images:
        found = first_of(schema.names, 8) or "none"
        raise DataError(f"{where}: no column holds images as bytes (columns: {found}); write them into a column 'image'")
    if len(images) > 1:
        raise DataError(f"{where}: {len(images)} columns hold images ({', '.join(images)}); keep one of them")
    label = _label(schema, kinds)
    classes = kinds.get(label, {}).get("names")
    return Columns(images[0], label, tuple(map(str, classes)) if isinstance(classes, list) else None)


def find_label_lists(schema: pa.Schema) -> tuple[str, tuple[str, ...] | None] | None:
    """(name, class names) of the column whose rows are lists of labels: the one of class labels, else one of whole numbers that
    is called as label columns are; None where there is none, or several of class labels."""
    kinds, lists = _kinds(schema), (pa.types.is_list, pa.types.is_large_list)
    whole = [
        field.name for field in schema if any(test(field.type) for test in lists) and pa.types.is_integer(field.type.value_type)
    ]
    inner = {name: kinds.get(name, {}).get("feature") or {} for name in whole}
    classes = [name for name in whole if inner[name].get("_type") == "ClassLabel"]
    name = classes[0] if len(classes) == 1 else next((name for name in _LABELS if name in whole and not classes), None)
    names = inner[name].get("names") if name else None
    return (name, tuple(map(str, names)) if isinstance(names, list) else None) if name else None


def label_values(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """[N] the values of a label column, -1 for null; those below 0 mean that there is no label.

    Raises pyarrow's ValueError for one that is no signed 64-bit number.
    """
    return pc.fill_null(column.cast(pa.int64()), -1).to_numpy()


def check_labels(largest: int, classes: tuple[str, ...] | None, *, where: str) -> None:
    """Raise DataError where there is a label that has no name among those there are."""
    if classes is not None and largest >= len(classes):
        raise DataError(
            f"{where}: names {len(classes)} classes, and there is a label {largest}; correct the labels or the names"
        )


def stored(value: dict | bytes | None) -> tuple[bytes, str | None]:
    """(bytes, path) of an image as its column holds it; no bytes where it is null."""
    if isinstance(value, dict):
        return value.get("bytes") or b"", value.get("path")
    return value or b"", None


def reason(error: Exception) -> str:
    """One line of what another library has to say."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def _kinds(schema: pa.Schema) -> dict[str, dict]:
    """What the Hugging Face library notes of each column; nothing where it wrote nothing."""
    try:
        kinds = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: kind for name, kind in kinds.items() if isinstance(kind, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _holds_bytes(schema: pa.Schema, name: str) -> bool:
    kind = schema.field(name).type
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_bytes(field.type) for field in kind)
    return _is_bytes(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    tests: tuple[Callable[[pa.DataType], bool], ...] = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(test(kind) for test in tests)


def _label(schema: pa.Schema, kinds: dict[str, dict]) -> str | None:
    whole = [name for name in schema.names if pa.types.is_integer(schema.field(name).type)]
    classes = [name for name in whole if kinds.get(name, {}).get("_type") == "ClassLabel"]
    if len(classes) == 1:
        return classes[0]
    return next((name for name in _LABELS if name in whole), None)
