"""How many samples each shard holds, from those who know already: a ``wids`` index, or a user's own ``sizes.json``.

With counts a run on remote shards begins at once: what lies where in a shard is found out, and its count checked, when its
first sample is read.
"""

import json
import os
from typing import Any

from vitssl.data import remote
from vitssl.data.stores import Access, is_url, parted, shown, unsigned
from vitssl.errors import DataError

SIZES = "sizes.json"


def read_wids(path: str, access: Access) -> dict[str, int]:
    """{shard: samples}, in order, of a wids index: ``{"shardlist": [{"url": ..., "nsamples": ...}, ...]}``.

    Relative addresses begin where the index lies. Raises DataError for a file that is none.
    """
    try:
        content = remote.small_file(path, access) if is_url(path) else _local(path)
        listed = [(each["url"], each["nsamples"]) for each in json.loads(content or b"")["shardlist"]]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); correct the path") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        what = "is no wids index, which is JSON with a shardlist of url and nsamples"
        raise DataError(f"{shown(path)}: {what}; name shards, or write it again") from None
    if not listed or not all(isinstance(url, str) and _is_count(count) for url, count in listed):
        raise DataError(
            f"{shown(path)}: its shardlist is empty, or holds a url that is no text or an nsamples that is no count"
        )
    for url, _ in listed if is_url(path) else ():
        if reason := _refusal(path, url, access):
            raise DataError(f"{shown(path)}: names {shown(url)[:80]}, which {reason}; name the shards themselves")
    folder = parted(path)[0]
    found = [(url if is_url(url) or os.path.isabs(url) or not folder else f"{folder}/{url}", count) for url, count in listed]
    names = [unsigned(url) for url, _ in found]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{shown(path)}: lists {shown(twice)} {names.count(twice)} times; list it once")
    return dict(found)


def counts_beside(folder: str, access: Access) -> dict[str, int]:
    """{file name: samples} of the ``sizes.json`` of a remote folder; nothing where there is none."""
    content = remote.small_file(f"{folder}/{SIZES}", access)
    try:
        found = json.loads(content) if content else {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(map(_is_count, found.values())):
        raise DataError(f"{shown(folder)}/{SIZES}: is not JSON of file names and counts; correct it or take it away")
    return found


def _refusal(index: str, url: str, access: Access) -> str:
    """Why a remote index, which is not to be trusted with what only this machine can reach, may not name ``url``."""
    if os.path.isabs(url):
        return "is a file of this machine"
    scheme, there = url.partition(":")[0].lower(), is_url(url)
    if not there or (scheme in ("s3", "gs", "hf") and url.split("/")[2:3] == index.split("/")[2:3]):
        return ""
    if scheme not in ("http", "https"):
        return "lies elsewhere"
    from vitssl.data.stores.connections import refusal  # imports urllib3: only where it is asked for

    return refusal(index, url, access.trusted)


def _local(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 40
