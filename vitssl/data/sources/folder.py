"""A nested folder of images; labels are the first-level folders where every image lies in one, also folders without an image.

Chunks hold one file each (up to two million): a file is read by itself, so nothing is gained by keeping neighbours together.
Surprising: linked folders are followed, each real folder once, because that is how people assemble data sets; and .npy files
are samples only where there is no picture, since beside pictures they are what somebody computed of them.
"""

import os
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from vitssl.data.sources.base import Ahead, Raw, file_stamp, fingerprint, one_by_one, read_file
from vitssl.data.tarscan import IMAGES, PICTURES
from vitssl.errors import DataError


class FolderSource:
    """Images below ``path``, sorted by their path. Hidden files and folders are skipped; ``ignored`` counts other files.

    Raises DataError where the folder is missing or holds no image.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.name = os.fspath(path)
        if not os.path.isdir(path):
            raise DataError(f"{self.name}: is not a folder; correct the path")
        files = sorted(_files(self.name, set()), key=lambda file: file.split("/"))
        images = _ending(files, PICTURES) or _ending(files, IMAGES)
        self.ignored = len(files) - len(images)
        if not images:
            kinds = ", ".join(f".{kind}" for kind in IMAGES)
            raise DataError(f"{self.name}: holds no image ({self.ignored:,} other files); images end in {kinds}")
        # One array of bytes, not a list of strings: forked workers would copy its pages by counting references.
        self._files = np.array([os.fsencode(file) for file in images])
        self.num_samples = len(images)
        self.chunks = one_by_one(self.num_samples)
        self.classes, self._labels = None, None
        if all("/" in file for file in images):
            with os.scandir(path) as entries:  # a class that lost its images is one all the same, and must not go unnoticed
                empty = {entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")}
            owners = [file.partition("/")[0] for file in images]
            names = np.array(sorted({*owners, *empty}))
            self.classes, self._labels = tuple(names.tolist()), np.searchsorted(names, owners).astype(np.int64)
        self.labels = self.classes is not None
        self.fingerprint = fingerprint(images)
        self.by_chunk, self.mean_bytes = False, 0

    def read(self, ids: Sequence[int], ahead: Ahead | None = None) -> list[Raw]:
        """The samples of these ids, in this order, each with its bytes or its problem."""
        return [self._read(number) for number in ids]

    def label_array(self) -> NDArray[np.int64] | None:
        """[N] labels, or None where an image lies outside the first-level folders."""
        return self._labels

    def stamp(self) -> bytes:
        """See :func:`vitssl.data.sources.base.stamp`."""
        return file_stamp(os.path.join(self.name, os.fsdecode(file)) for file in self._files)

    def _read(self, number: int) -> Raw:
        file = os.fsdecode(self._files[number])
        label = None if self._labels is None else int(self._labels[number])
        return read_file(os.path.join(self.name, file), key=file, label=label)


def _ending(files: list[str], kinds: tuple[str, ...]) -> list[str]:
    return [file for file in files if file.rpartition(".")[2].lower() in kinds]


def _files(folder: str, seen: set[str], prefix: str = "") -> Iterator[str]:
    """Paths below ``folder`` with / between their parts, in no order."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _files(entry.path, seen, f"{prefix}{entry.name}/")
            elif entry.is_file():
                yield prefix + entry.name
