"""The one contract of every place that holds files: how large one is, some of its bytes, all of its bytes.

What is wrong with a request raises DataError and will be so again. What the network or the moment decided raises
:class:`Passing`: at once where the store gave an answer, as :class:`Unreachable` where there was none for a while. Stores are
small pickles and survive a fork.
"""

import re
from typing import BinaryIO, NamedTuple, Protocol

from vitssl.errors import DataError

_URL = re.compile(r"[a-z][a-z0-9+.-]*:", flags=re.IGNORECASE)
_USER = re.compile(r"(?<=://)[^/\s]*@")
_QUERY = re.compile(r"(://[^\s?]*)\?([^\s\]'\"#]*)")
_NAMES = "v|version|versionid|generation|revision|rev|ref|download|dl|raw|alt|format"  # of what in a query is no secret
_HARMLESS = re.compile(rf"({_NAMES})=[\w.-]{{0,64}}", flags=re.IGNORECASE)


class Passing(DataError):
    """What a store said of a file, and may say otherwise tomorrow: that it is not there, not ours, or another than then."""


class Unreachable(Passing):
    """Bytes that did not come although they were asked for again and again: the network's fault, or the moment's."""


class NoRanges(DataError):
    """A file that can only be had whole."""


class Stat(NamedTuple):
    """A file's size in bytes, its tag (changes with its content; empty where unknown), and whether parts of it can be read."""

    size: int
    tag: str
    ranges: bool


class Store(Protocol):
    """Files named by urls."""

    def stat(self, url: str) -> Stat:
        """Raises Passing, where there is no such file among others."""
        ...

    def read(self, url: str, offset: int, length: int, *, size: int | None = None) -> bytes:
        """Exactly these bytes of a file of ``size``. Raises Passing (gone, of another size), NoRanges."""
        ...

    def fetch(self, url: str, file: BinaryIO, *, size: int | None = None) -> None:
        """Write all bytes to ``file``, which are ``size``. Raises Passing, where they are not as many among others."""
        ...

    def find(self, pattern: str) -> list[str]:
        """The urls that a folder or a glob names, sorted. Raises ConfigError where the store cannot list."""
        ...


def is_url(path: str) -> bool:
    """Whether a path names something that is no local file: a scheme of two letters or more and a colon."""
    return len(found.group()) > 2 if (found := _URL.match(path)) else False


def globbed(path: str) -> bool:
    """Whether a path holds signs of a pattern (a question mark begins a query)."""
    return bool(set("*[") & set(path))


def parted(path: str) -> tuple[str, str]:
    """(folder, file name) of a local path or a url, whose query is part of neither."""
    if not is_url(path):
        folder, slash, name = path.rpartition("/")  # os.path takes four times as long, and there are a hundred thousand
        return folder or slash, name
    plain = path.split("?", 1)[0].split("#", 1)[0]
    folder, _, name = plain.rpartition("/")
    return folder, name


def without_secrets(text: str) -> str:
    """A text without the users, passwords and queries of its urls, but for what is known to be no secret, such as a version.

    Of a command of the shell its ends are left.
    """

    def plain(found: re.Match) -> str:
        kept = [each for each in found[2].split("&") if _HARMLESS.fullmatch(each)]
        return f"{found[1]}?{'&'.join(kept)}" if kept else found[1]

    return shown(text) if text.startswith("pipe:") else _QUERY.sub(plain, _USER.sub("", text))


def unsigned(path: str) -> str:
    """What names a file for good: a url without its query, since the next signature of a file is another one."""
    return path if not is_url(path) or path.startswith("pipe:") else "/".join(parted(path))


def beside(path: str, suffix: str) -> str:
    """The file whose name is that of ``path`` and a suffix; of a url without its query, which is the shard's alone."""
    return f"{path}{suffix}" if not is_url(path) else "/".join(parted(path)) + suffix


def shown(url: str) -> str:
    """A url for people, logs and ledgers: without user, password and query, which may be secrets; of a command, its ends."""
    if url.startswith("pipe:"):
        words = url[5:].split()
        return f"pipe:{words[0]} ... {parted(shown(words[-1]))[1]}" if len(words) > 1 else url
    scheme, mark, rest = url.partition("://")
    if not mark:
        return url
    host, slash, path = rest.split("?", 1)[0].split("#", 1)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
