"""Files on web servers: parts by range requests, with patience for servers that are busy, stall, or cut a body short.

A body that breaks off is continued where it ended. Redirects are followed by hand, because a list of urls is not to be trusted
with the network behind the firewall: at most five, to another host over https only, never to a private address, never with
the first host's credentials.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.exceptions import HTTPError

from vitssl.data.stores.base import NoRanges, Passing, Stat, Unreachable, shown
from vitssl.data.stores.connections import WATCH, host_of, pools, refusal
from vitssl.errors import ConfigError, DataError

_BUSY = (408, 425, 429, 500, 502, 503, 504)
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 5
_PIECE = 1 << 20  # bytes of a body that are taken at once
_FEW = 4096  # bytes that are no gain: of them an answer might bring one at a time
_LONGEST = 60.0  # seconds between two tries, whatever the server asks for


class HttpStore:
    """``tries`` in a row that gain nothing end in Unreachable; ``wait`` seconds before the second, doubled each time.

    ``timeout`` in seconds for connecting and for each silence. ``trusted`` are host names that a redirect may lead to although
    their addresses are private.
    """

    def __init__(
        self, *, tries: int = 6, wait: float = 0.5, timeout: float = 30.0, trusted: frozenset[str] = frozenset()
    ) -> None:
        self.tries, self.wait, self.timeout, self.trusted = tries, wait, timeout, trusted
        self._pools: tuple[int, dict[tuple[str, bool], urllib3.PoolManager]] = -1, {}

    def stat(self, url: str) -> Stat:
        """From the answer to a request for the first byte: some servers that know ranges answer HEAD wrongly or not at all."""

        def ask() -> Stat:
            with self._answer(url, {"Range": "bytes=0-0"}) as answer:
                if answer.status == 416:  # the file is empty
                    return Stat(0, "", ranges=True)
                tag = _tag(answer)
                if answer.status == 206:
                    next(self._pieces(answer), b"")  # one byte: the connection is kept
                    return Stat(_span(url, answer)[2], tag, ranges=True)
                size = answer.headers.get("Content-Length", "")
                if not _is_number(size):
                    raise DataError(f"{shown(url)}: the server does not say how long it is; use another server or a local copy")
                return Stat(int(size), tag, ranges=False)

        return self._patiently(url, ask)

    def read(self, url: str, offset: int, length: int, *, size: int | None = None) -> bytes:
        """Bytes ``offset`` to ``offset + length``; several requests where the server cuts its answers short."""
        got, tags = bytearray(), set()

        def ask() -> None:
            first = offset + len(got)
            with self._answer(url, {"Range": f"bytes={first}-{offset + length - 1}"}) as answer:
                if answer.status == 416:
                    raise Passing(f"{shown(url)}: ends before byte {first:,}; it changed since it was indexed: index it again")
                if answer.status != 206:
                    raise NoRanges(f"{shown(url)}: the server reads no ranges")
                begin, _, total = _span(url, answer)
                if size is not None and total != size:
                    raise Passing(f"{shown(url)}: has {total:,} bytes and had {size:,} when it was indexed; index it again")
                tags.add(_tag(answer))
                if len(tags) > 1:
                    raise Passing(f"{shown(url)}: changed while it was read; index it again")
                if begin != first:
                    raise Unreachable(f"{shown(url)}: the server sent other bytes than those asked for")
                for piece in self._pieces(answer):
                    got.extend(piece[: length - len(got)])

        if length:
            self._patiently(url, ask, gained=lambda: len(got), enough=lambda: len(got) >= length)
        return bytes(got)

    def fetch(self, url: str, file: BinaryIO, *, size: int | None = None) -> None:
        """The whole body, continued where it broke off if the server can, else from its beginning."""
        start, stated, tag = file.tell(), size, ""

        def ask() -> None:
            nonlocal stated, tag
            done = file.tell() - start
            unchanged = {"If-Range": tag} if tag and not tag.startswith("W/") else {}  # or all of it, from its beginning
            with self._answer(url, {"Range": f"bytes={done}-", **unchanged} if done else {}) as answer:
                if done and answer.status == 416:  # an earlier answer promised more than there is
                    if answer.headers.get("Content-Range") != f"bytes */{done}":
                        raise Passing(f"{shown(url)}: has {done:,} bytes and was said to have {stated:,}; look at the server")
                    stated = done
                    return
                if done and (answer.status != 206 or _span(url, answer)[0] != done):
                    file.seek(start)
                    file.truncate()
                length = answer.headers.get("Content-Length", "")
                if file.tell() == start:
                    tag, stated = _tag(answer), int(length) if _is_number(length) else stated
                for piece in self._pieces(answer):
                    file.write(piece)
                    if size is not None and file.tell() - start > size:
                        raise Passing(
                            f"{shown(url)}: is longer than the {size:,} bytes it was said to have; look at the server"
                        )

        def whole() -> bool:
            return stated is None or file.tell() - start >= stated

        self._patiently(url, ask, gained=lambda: file.tell(), enough=whole)
        if size is not None and file.tell() - start != size:
            raise Passing(f"{shown(url)}: has {file.tell() - start:,} bytes and was said to have {size:,}; look at the server")

    def find(self, pattern: str) -> list[str]:
        """Web servers have no common way to list a folder."""
        raise ConfigError(
            f"{shown(pattern)}: a web server does not list its files; write a range, as in shard-{{000..099}}.tar"
        )

    def _patiently(
        self,
        url: str,
        ask: Callable[[], object],
        *,
        gained: Callable[[], int] = lambda: 0,
        enough: Callable[[], bool] = lambda: True,
    ) -> object:
        """``ask()`` until it went well and brought ``enough``; tries are counted anew whenever more than a few bytes were
        ``gained``."""
        failures, before, reason = 0, gained(), ""
        while failures < self.tries:
            pause, won = self.wait * 2**failures, False
            try:
                found = ask()
                if enough():
                    return found
                reason, won = "the answer ended early", gained() > before + _FEW
            except _Busy as busy:
                reason, pause = f"status {busy.status}", max(pause, busy.pause)
            except ValueError as error:  # an address or a header that is none
                raise DataError(f"{shown(url)}: {_in_words(error)}; name another address") from None
            except Unreachable as error:  # a trickle wins nothing
                reason = str(error).partition(": ")[2] or str(error)
            except (HTTPError, OSError) as error:
                reason, won = _in_words(error), gained() > before + _FEW
            failures, before = (1 if won else failures + 1), gained()
            if failures < self.tries:
                time.sleep(min(pause, _LONGEST))
        raise Unreachable(f"{shown(url)}: cannot be reached ({reason}, {self.tries} tries); look at the network and the server")

    @contextmanager
    def _answer(self, url: str, headers: dict[str, str]) -> Iterator[urllib3.BaseHTTPResponse]:
        """The answer to a GET, redirects followed, its body unread. Raises _Busy, and DataError for what is refused."""
        origin, credentials = urlsplit(url), _credentials(url)
        current = url
        for _ in range(_MOST_REDIRECTS + 1):
            parts = urlsplit(current)
            same = host_of(parts) == host_of(origin)
            answer = self._manager(current, public=not same and parts.hostname not in self.trusted).request(
                "GET",
                _without_credentials(current),
                headers={"Accept-Encoding": "identity", **headers, **(credentials if same else {})},
                preload_content=False,
                redirect=False,
                retries=False,
                timeout=urllib3.Timeout(connect=self.timeout, read=self.timeout),
            )
            try:
                if answer.status not in _REDIRECTS:
                    _judge(url, answer)
                    yield answer
                    return
                current = self._next_place(url, current, answer.headers.get("Location", ""))
            finally:
                answer.close()  # a body that was read to its end has given its connection back; no other is worth the reading
        raise DataError(f"{shown(url)}: more than {_MOST_REDIRECTS} redirects; name the file's own address")

    def _pieces(self, answer: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
        """The body as it comes. Raises Unreachable for one that trickles: less than 1 KiB a second over a whole timeout."""
        came, since, held = 0, time.monotonic(), getattr(answer.connection, "held", None)

        def more() -> bytes:
            with WATCH.within(held, self.timeout):
                return answer.read1(_PIECE, decode_content=False)

        while piece := more():
            yield piece
            came += len(piece)
            if (passed := time.monotonic() - since) > self.timeout:
                if came < 1024 * passed:
                    raise Unreachable(f"{came:,} bytes in {passed:.0f} s")
                came, since = 0, time.monotonic()

    def _next_place(self, url: str, current: str, location: str) -> str:
        """Where a redirect leads, or DataError where it must not."""
        target = urljoin(current, location)
        if reason := refusal(current, target, self.trusted) if location else "is no web address":
            raise DataError(f"{shown(url)}: redirects to {shown(target)[:80]}, which {reason}; name the file's own address")
        return target

    def _manager(self, url: str, *, public: bool) -> urllib3.PoolManager:
        """This process's connections (a forked child must not talk on its parent's), through the environment's proxy if any."""
        if self._pools[0] != os.getpid():
            self._pools = os.getpid(), {}
        parts, proxies = urlsplit(url), getproxies()
        proxy = "" if proxy_bypass(parts.hostname or "") else proxies.get(parts.scheme, "")
        known = self._pools[1]
        if (proxy, public) not in known:
            known[proxy, public] = pools(proxy, public=public)
        return known[proxy, public]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_pools": (-1, {})}


class _Busy(Exception):
    def __init__(self, status: int, pause: float) -> None:
        self.status, self.pause = status, pause


def _judge(url: str, answer: urllib3.BaseHTTPResponse) -> None:
    if answer.status in _BUSY:
        after = answer.headers.get("Retry-After", "")
        raise _Busy(answer.status, float(after) if _is_number(after) else 0.0)
    if answer.status in (200, 206, 416):
        return
    words = {401: "wants credentials", 403: "is forbidden", 404: "is not there", 410: "is gone"}
    what = words.get(answer.status, "was refused")
    raise Passing(f"{shown(url)}: {what} (status {answer.status}); correct the address or put the file there")


def _span(url: str, answer: urllib3.BaseHTTPResponse) -> tuple[int, int, int]:
    """(first, last, size) of a partial answer."""
    said = answer.headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", said.strip())
    if not found:
        raise DataError(f"{shown(url)}: the server answers with a range of {said[:40]!r}; use another server or a local copy")
    return int(found[1]), int(found[2]), int(found[3])


def _tag(answer: urllib3.BaseHTTPResponse) -> str:
    """What changes with a file's content; empty where the server does not say."""
    return answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""


def _is_number(text: str) -> bool:
    return re.fullmatch("[0-9]{1,18}", text) is not None


def _in_words(error: Exception) -> str:
    if "IncompleteRead" in str(error):
        return "the answer ended early"
    return " ".join(str(error).split()).rpartition(": ")[2] or type(error).__name__


def _credentials(url: str) -> dict[str, str]:
    parts = urlsplit(url)
    if not parts.username:
        return {}
    return urllib3.make_headers(basic_auth=f"{unquote(parts.username)}:{unquote(parts.password or '')}")


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
