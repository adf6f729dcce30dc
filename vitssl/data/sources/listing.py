"""A file list: images named one a line (.txt), or in a table with a header (.csv, .tsv) that may give each a label.

Labels that are all whole numbers from 0 are taken as they are, others are names: sorted, they are the classes. Relative paths
begin at the list's folder. Surprising: only the first image is looked for when the list is opened, because looking for millions
takes minutes on a file server; one that is missing later is told when its turn comes.
"""

import csv
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from vitssl.data.sources.base import Ahead, Raw, file_stamp, fingerprint, one_by_one, read_file
from vitssl.data.sources.several import LabelSets, label_sets
from vitssl.errors import ConfigError, DataError

LISTS = (".txt", ".csv", ".tsv")
_PATHS = ("path", "file_name", "filename", "image")  # columns of a header; where there are several, the first of these
_LABELS = ("label", "class")
_Row = tuple[str, str | None]  # path and label; every label is None where there is no column of them


class ListSource:
    """Images that the file ``path`` names, in its order. In a .txt, blank lines and lines that begin with # are passed over.

    An image that is listed twice is two samples of one key. Raises ConfigError for other kinds of file, DataError for a list
    that is missing or empty, has no header or a line that does not fit it, and where its first image is not there.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.name = os.fspath(path)
        kind = os.path.splitext(self.name)[1].lower()
        if kind not in LISTS:
            raise ConfigError(f"{self.name}: a list of images ends in {', '.join(LISTS)}; rename it, or correct the kind")
        files, cells = _parsed(self.name, _lines if kind == ".txt" else _table)
        # One array of bytes, not a list of strings: forked workers would copy its pages by counting references.
        self._files = np.array([os.fsencode(file) for file in files])
        self.num_samples = len(files)
        self.num_unlabelled = self.num_samples - len(cells) + cells.count("")
        self.labels = self.num_unlabelled == 0
        self.classes, self._labels = _numbered(cells) if self.labels else (None, None)
        self.fingerprint = fingerprint([f"{self.num_samples}", *files, *cells])
        self.chunks = one_by_one(self.num_samples)
        self.ignored = 0
        self.by_chunk, self.mean_bytes = False, 0
        if not os.path.isfile(first := self._where(files[0])):
            raise DataError(
                f"{self.name}: its first image, {first}, is not there; paths begin at / or in the list's folder: correct them"
            )

    def read(self, ids: Sequence[int], ahead: Ahead | None = None) -> list[Raw]:
        """The samples of these ids, in this order, each with its bytes or its problem."""
        return [self._read(number) for number in ids]

    def label_array(self) -> NDArray[np.int64] | None:
        """[N] labels, or None unless every image has one (``num_unlabelled`` counts those that have none)."""
        return self._labels

    def stamp(self) -> bytes:
        """See :func:`vitssl.data.sources.base.stamp`."""
        return file_stamp(self._where(os.fsdecode(file)) for file in self._files)

    def label_sets(self) -> LabelSets:
        """The labels of all images, several each: those of a cell with ; between them, none where it is empty.

        Read again from the file, so that a list of single labels need not carry them. Raises DataError without such a column.
        """
        files, cells = _parsed(self.name, _lines if self.name.lower().endswith(".txt") else _table)
        if len(cells) != len(files):
            raise DataError(f"{self.name}: has no column of labels; add one that is called {' or '.join(_LABELS)}")
        sets = [[word.strip() for word in cell.split(";") if word.strip()] for cell in cells]
        counts = np.array([len(each) for each in sets], dtype=np.int64)
        classes, labels = _numbered([word for each in sets for word in each])
        return label_sets(counts, labels, classes)

    def _read(self, number: int) -> Raw:
        file = os.fsdecode(self._files[number])
        return read_file(self._where(file), key=file, label=None if self._labels is None else int(self._labels[number]))

    def _where(self, file: str) -> str:
        return os.path.join(os.path.dirname(self.name), file)


def _parsed(name: str, read: Callable[[str, Iterator[str]], Iterator[_Row]]) -> tuple[list[str], list[str]]:
    """The paths and the cells of the label column, of which there are none where there is no such column."""
    try:
        # Bytes that are not UTF-8 may be part of a file's name, which is bytes as well.
        with open(name, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = list(read(name, file))
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or error}); correct the path") from None
    except csv.Error as error:
        raise DataError(f"{name}: is no table ({error}); look for a quote that is not closed") from None
    if not rows:
        raise DataError(f"{name}: lists no image; write one path a line")
    files = [file for file, _ in rows]
    if any("\0" in file for file in files):
        raise DataError(f"{name}: holds zero bytes, so it is no text in UTF-8; save it as that")
    return files, [label for _, label in rows if label is not None]


def _lines(name: str, file: Iterator[str]) -> Iterator[_Row]:
    return ((line.strip(), None) for line in file if line.strip() and not line.startswith("#"))


def _table(name: str, file: Iterator[str]) -> Iterator[_Row]:
    rows = csv.reader(file, delimiter="\t" if name.lower().endswith(".tsv") else ",")
    header = [cell.strip().lower() for cell in next(rows, [])]
    path = next((header.index(column) for column in _PATHS if column in header), None)
    label = next((header.index(column) for column in _LABELS if column in header), None)
    if path is None:
        first = ", ".join(header)[:60]
        raise DataError(
            f"{name}: its first line ({first}) is no header; begin with one that names the columns, as path,label does "
            f"(for path also {', '.join(_PATHS[1:])}; for label also {', '.join(_LABELS[1:])}; label may be missing)"
        )
    for row in rows:
        if not row:
            continue
        cells = [cell.strip() for cell in row]
        if len(cells) != len(header):
            raise DataError(
                f"{name}: line {rows.line_num} has {len(cells)} cells and the header {len(header)}; correct it, "
                "and quote what holds the separator"
            )
        if not cells[path]:
            raise DataError(f"{name}: line {rows.line_num} names no image; correct it or take it out")
        yield cells[path], None if label is None else cells[label]


def _numbered(cells: list[str]) -> tuple[tuple[str, ...] | None, NDArray[np.int64]]:
    """(class names or None, [N] labels)."""
    if all(cell.isascii() and cell.isdigit() and len(cell) <= 18 for cell in cells):
        return None, np.array(cells, dtype=np.int64)
    names, labels = np.unique(cells, return_inverse=True)
    return tuple(names.tolist()), labels.astype(np.int64)
