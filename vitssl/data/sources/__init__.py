"""Where images come from: tar shards, a folder of images, the demo, or a choice of samples of any of them.

All keep the contract of :class:`Source`. Adding a source is one file here and one line in :func:`open_source`.
"""

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from vitssl.data import demo
from vitssl.data.sources.base import Raw, Source
from vitssl.data.sources.folder import FolderSource
from vitssl.data.sources.joined import Joined
from vitssl.data.sources.patterns import find_shards, is_shard, shards_of_url
from vitssl.data.sources.shards import ShardSource
from vitssl.data.sources.subset import Subset, label_like, take_labelled
from vitssl.data.stores import USUAL, Access, is_url, parted, shown
from vitssl.data.tarscan import IMAGES
from vitssl.errors import ConfigError, DataError

__all__ = [
    "FolderSource",
    "Joined",
    "Raw",
    "ShardSource",
    "Source",
    "Subset",
    "find_shards",
    "label_like",
    "open_source",
    "take_labelled",
]

Kind = Literal["auto", "shards", "folder", "demo"]


def open_source(
    path: str | os.PathLike | Sequence[str],
    *,
    kind: Kind = "auto",
    split: str | None = None,
    access: Access = USUAL,
    progress: Callable[[int, int], None] | None = None,
) -> Source:
    """Open what the user named.

    ``auto``: a folder that holds tars, a pattern, urls or a list are shards, any other folder is one of images. ``split``
    picks the sub-folder ``<split>/`` or the shards ``<split>-*.tar`` of a folder. ``demo`` renders the demo set into ``path``
    once and opens its ``train`` (default) or ``test`` split. ``progress(done, all)`` counts shards indexed (demo: also images
    drawn). Raises ConfigError, and DataError where something is missing, empty or damaged.
    """
    path = [_at_home(each) for each in path] if isinstance(path, list | tuple) else _at_home(path)
    if kind == "demo":
        if not isinstance(path, str):
            raise ConfigError(f"the demo is rendered into one folder, but the path lists {len(path)}; name one folder")
        demo.render(Path(path), progress=progress)
        split = split or "train"
    if split is not None:
        path = _split(path, split, access)
    if kind == "auto":
        kind = _kind(path)
    return FolderSource(path) if kind == "folder" else ShardSource(path, access=access, progress=progress)


def _at_home(path: str | os.PathLike) -> str:
    return os.path.expanduser(os.fspath(path))


def _kind(path: str | list[str]) -> Literal["shards", "folder"]:
    if not (isinstance(path, str) and os.path.isdir(path)):
        return "shards"
    files = [os.path.join(path, name) for name in os.listdir(path) if not name.startswith(".")]
    if not any(is_shard(os.path.basename(file)) for file in files):
        return "folder"
    inside = itertools.chain.from_iterable(os.listdir(file) for file in files if os.path.isdir(file))
    if any(name.rpartition(".")[2].lower() in IMAGES for name in itertools.chain(files, inside)):
        raise ConfigError(f"{path}: holds tar shards and images; say which are meant with kind=shards or kind=folder")
    return "shards"


def _split(path: str | list[str], split: str, access: Access) -> str | list[str]:
    """The sub-folder of a split, or its shards."""
    if isinstance(path, str) and is_url(path):
        found = shards_of_url(path, access)
        if not (shards := [shard for shard in found if parted(shard)[1].startswith(f"{split}-")]):
            raise DataError(f"{shown(path)}: none of its {len(found):,} shards is named {split}-*.tar; correct it")
        return shards
    if not isinstance(path, str) or not os.path.isdir(path):
        raise ConfigError(f"split {split!r} is looked up in a folder, but {path!r} is none; name a folder or no split")
    names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    if split in names and os.path.isdir(os.path.join(path, split)):
        return os.path.join(path, split)
    shards = [os.path.join(path, name) for name in names if is_shard(name) and name.startswith(f"{split}-")]
    if not shards:
        found = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "nothing"
        raise DataError(f"{path}: has no folder {split!r} and no shards {split}-*.tar (it holds {found}); correct it")
    return shards
