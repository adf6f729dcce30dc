"""Where images come from: tar shards, a folder, a list, parquet files, a Hugging Face data set, the demo, or a choice of these.

All keep the contract of :class:`Source`. Adding a source is one file here and one line in :func:`open_source`.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from vitssl.data import demo
from vitssl.data.sources.balanced import Balanced
from vitssl.data.sources.base import Raw, Source, refuse_stray, same_samples, stamp
from vitssl.data.sources.folder import FolderSource
from vitssl.data.sources.joined import Joined
from vitssl.data.sources.listing import LISTS, ListSource
from vitssl.data.sources.patterns import PARQUET, TAR, Form, find_shards, is_saved, is_shard, shards_of_url
from vitssl.data.sources.several import Several, several_labels, several_like
from vitssl.data.sources.shards import ShardSource
from vitssl.data.sources.subset import Renumbered, Subset, label_like, take_labelled
from vitssl.data.stores import USUAL, Access, is_url, parted, shown
from vitssl.data.tarscan import PICTURES
from vitssl.errors import ConfigError, DataError, first_of

__all__ = [
    "Balanced",
    "FolderSource",
    "Joined",
    "ListSource",
    "Raw",
    "Renumbered",
    "Several",
    "ShardSource",
    "Source",
    "Subset",
    "find_shards",
    "label_like",
    "open_source",
    "refuse_stray",
    "same_samples",
    "several_labels",
    "several_like",
    "stamp",
    "take_labelled",
]

Kind = Literal["auto", "shards", "folder", "list", "parquet", "hub", "demo"]


def open_source(
    path: str | os.PathLike | Sequence[str],
    *,
    kind: Kind = "auto",
    split: str | None = None,
    access: Access = USUAL,
    progress: Callable[[int, int], None] | None = None,
) -> Source:
    """Open what the user named.

    ``auto``: a pattern, urls or a list are shards, or parquet files if they end so; a .txt, .csv or .tsv is a file list; a
    folder is what ``save_to_disk`` wrote, else its tars, else its parquet files, else one of images. ``hub`` is what the
    ``datasets`` library loads by its name. ``split`` picks the sub-folder ``<split>/`` or the shards ``<split>-*`` of a folder,
    or the split of a data set. ``demo`` renders the demo set into ``path`` once and opens its ``train`` (default) or ``test``
    split. ``progress(done, all)`` counts shards indexed (demo: also images drawn). Raises ConfigError, and DataError where
    something is missing, empty or damaged.
    """
    path = [_at_home(each) for each in path] if isinstance(path, list | tuple) else _at_home(path)
    if kind in ("demo", "list", "hub") and not isinstance(path, str):
        raise ConfigError(f"kind={kind} opens one path, and there are {len(path)}; name one, or mix them with data.sources")
    if kind == "demo":
        demo.render(Path(path), progress=progress)
        split = split or "train"
    if kind == "auto" and isinstance(path, str) and is_saved(path):
        kind = "hub"
    if split is not None and kind != "hub":
        path, split = _split(path, split, kind, access), None
    if kind == "auto":
        kind = _kind(path)
    if kind == "folder":
        return FolderSource(path)
    if kind == "list":
        return ListSource(path)
    if kind == "parquet":
        with _installed(kind):
            from vitssl.data.sources.parquet import ParquetSource
        return ParquetSource(path, access=access, progress=progress)
    if kind == "hub":
        with _installed(kind):
            from vitssl.data.sources.hub import HubSource
        return HubSource(path, split=split)
    return ShardSource(path, access=access, progress=progress)


def _at_home(path: str | os.PathLike) -> str:
    return os.path.expanduser(os.fspath(path))


@contextmanager
def _installed(kind: str) -> Iterator[None]:
    """Around the import of a source that needs more than the library does."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f"kind={kind} needs {error.name}, which is not installed; pip install 'vitssl[hub]'") from None


def _kind(path: str | list[str]) -> Kind:
    if not isinstance(path, str):
        return "parquet" if path and all(is_shard(parted(each)[1], PARQUET) for each in path) else "shards"
    if is_url(path) or not os.path.isdir(path):
        if os.path.isfile(path) and path.lower().endswith(LISTS):
            return "list"
        return "parquet" if is_shard(parted(path)[1], PARQUET) else "shards"
    if is_saved(path):
        return "hub"
    with os.scandir(path) as entries:
        files = [entry for entry in entries if not entry.name.startswith(".")]
    held = next((form for form in (TAR, PARQUET) if any(is_shard(file.name, form) for file in files)), None)
    if held is None:
        return "folder"
    kind = "shards" if held is TAR else "parquet"
    inside = itertools.chain.from_iterable(os.listdir(file) for file in files if file.is_dir())
    if any(name.rpartition(".")[2].lower() in PICTURES for name in itertools.chain((file.name for file in files), inside)):
        raise ConfigError(f"{path}: holds {held.several} and images; say which are meant with kind={kind} or kind=folder")
    return kind


def _split(path: str | list[str], split: str, kind: Kind, access: Access) -> str | list[str]:
    """The sub-folder of a split, or its shards."""
    if isinstance(path, str) and is_url(path):
        form = PARQUET if kind == "parquet" else TAR
        found = shards_of_url(path, access, form=form)
        if not (shards := [shard for shard in found if parted(shard)[1].startswith(f"{split}-")]):
            named = f"{split}-*{form.suffixes[0]}"
            raise DataError(f"{shown(path)}: none of its {len(found):,} shards is named {named}; correct it")
        return shards
    if not isinstance(path, str) or not os.path.isdir(path):
        raise ConfigError(f"split {split!r} is looked up in a folder, but {path!r} is none; name a folder or no split")
    names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    if split in names and os.path.isdir(os.path.join(path, split)):
        return os.path.join(path, split)
    forms: tuple[Form, ...] = {"auto": (TAR, PARQUET), "parquet": (PARQUET,)}.get(kind, (TAR,))
    for form in forms:
        if shards := [name for name in names if is_shard(name, form) and name.startswith(f"{split}-")]:
            return [os.path.join(path, name) for name in shards]
    found = first_of(names, 5) or "nothing"
    wanted = " or ".join(f"{split}-*{form.suffixes[0]}" for form in forms)
    raise DataError(f"{path}: has no folder {split!r} and no shards {wanted} (it holds {found}); correct it")
