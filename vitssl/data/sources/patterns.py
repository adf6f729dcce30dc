"""Which shards a user means by a brace pattern, a glob, a folder, a file, a url, or a list of these."""

import glob
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from braceexpand import braceexpand

from vitssl.data.index import SUFFIX
from vitssl.data.manifest import NAME, read_manifest
from vitssl.data.stores import USUAL, Access, globbed, is_url, open_store, parted, shown
from vitssl.errors import ConfigError, DataError


class Form(NamedTuple):
    """What shards are: the words for one and for several, and how their names end."""

    one: str
    several: str
    suffixes: tuple[str, ...]


# Compressed tars too: refused, not overlooked.
TAR = Form("tar", "tar shards", (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"))
PARQUET = Form("parquet file", "parquet files", (".parquet",))


_SEVERAL = re.compile(r"::(?![^\[]*\])")  # between patterns, as webdataset has it; not the colons of an IPv6 address


def find_shards(path: str | Sequence[str], access: Access = USUAL, *, form: Form = TAR) -> list[str]:
    """The shards that a brace pattern, a glob, a folder, a file, a url or a list of these names, in order.

    Raises ConfigError for patterns that do not expand and urls that are not allowed, DataError for what is not there.
    """
    if isinstance(path, str):
        return _expand(path, access, form)
    if not path:
        raise ConfigError("the list of shards is empty; name at least one")
    return [shard for each in path for shard in _expand(each, access, form)]


def is_shard(name: str, form: Form = TAR) -> bool:
    """Whether a path or a file name is that of a shard."""
    return name.lower().endswith(form.suffixes) and not name.rpartition("/")[2].startswith(".")


def lies_beside(path: str) -> bool:
    """Whether a path that a pattern met is one of the files that indexing leaves beside shards."""
    return path.endswith(SUFFIX) or os.path.basename(path) == NAME


def is_saved(path: str) -> bool:
    """Whether a folder is a data set, or splits of one, that the ``datasets`` library saved to a disk."""
    held = set(os.listdir(path)) if os.path.isdir(path) else set()
    return "dataset_dict.json" in held or {"state.json", "dataset_info.json"} <= held


def shortened(path: str | Sequence[str]) -> str:
    """What a user named, for messages: a list by its first."""
    if isinstance(path, str):
        return shown(path)
    paths = [shown(each) for each in path[:1]]
    return paths[0] if len(path) == 1 else f"{paths[0]} and {len(path) - 1} more" if paths else "no shards"


def shards_of_url(url: str, access: Access = USUAL, *, form: Form = TAR) -> list[str]:
    """The shards of a remote folder or glob: those its manifest (of tars) names, or those its store lists.

    Raises ConfigError for a web server's folder that has no manifest, DataError where there is no shard.
    """
    names = read_manifest(url.rstrip("/"), access)["name"] if form is TAR else ()
    found = [f"{url.rstrip('/')}/{os.fsdecode(name)}" for name in names] or open_store(url, access).find(url)
    shards = [each for each in found if is_shard(parted(each)[1], form)]
    if not shards:
        other = any(is_shard(parted(each)[1], PARQUET) for each in found)
        hint = "name kind=parquet" if other else "correct the address"
        raise DataError(f"{shown(url)}: no {form.several} are there ({len(found):,} other files); {hint}")
    return shards


def _expand(pattern: str, access: Access, form: Form) -> list[str]:
    if not is_url(pattern) and os.path.isdir(pattern):
        before = os.path.join(pattern, "")
        shards = [before + name for name in sorted(os.listdir(pattern)) if is_shard(name, form)]
        if not shards:
            raise DataError(f"{pattern}: this folder holds no {form.several} ({_holds(pattern, form)}); correct the path")
        return shards
    if os.path.exists(pattern):
        return [pattern]
    try:
        expanded = [each for part in _SEVERAL.split(pattern) for each in braceexpand(part)]
    except ValueError as error:
        raise ConfigError(f"{shown(pattern)!r}: braces do not match ({error}); write ranges as {{000..099}}") from None
    if is_url(pattern):
        expanded = [each.partition(":")[0].lower() + ":" + each.partition(":")[2] for each in expanded]
        open_store(pattern, access)  # refuses a scheme before anything is asked
        whole = [[each] if _is_one(each, form) else shards_of_url(each, access, form=form) for each in expanded]
        return [shard for found in whole for shard in found]
    shards, missing = [], []
    for each in expanded:
        found = [each] if os.path.isfile(each) else sorted(path for path in glob.glob(each) if not lies_beside(path))
        shards += found
        missing += [] if found else [each]
    if missing:
        folder = os.path.dirname(missing[0]) or "."
        what = "nothing is there"
        if len(expanded) > 1:
            what = f"{len(missing)} of {len(expanded)} shards are missing, the first is {missing[0]}"
        raise DataError(f"{pattern}: {what}; {folder} {_holds(folder, form)}: correct the path")
    return shards


def _is_one(url: str, form: Form) -> bool:
    """Whether a url names one shard, and no folder or glob."""
    return url.startswith("pipe:") or (is_shard(parted(url)[1], form) and not globbed(parted(url)[1]))


def _holds(folder: str, form: Form) -> str:
    """What a folder holds, in words, for a message about what it does not."""
    if not os.path.isdir(folder):
        return "is not a folder"
    names = sorted(os.listdir(folder))
    shards = [name for name in names if is_shard(name, form)]
    if not shards:
        return f"holds {len(names)} files and no {form.one}"
    return f"holds {len(shards)} {form.several}, {shards[0]} to {shards[-1]}"
