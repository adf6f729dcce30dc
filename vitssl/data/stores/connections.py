"""Connections to web servers that nobody can hold for ever, and where one address may lead to another.

A timeout of a socket is one of each silence: who sends a byte of a header now and then is never silent. Here a watch shuts what
takes longer than it may. And a host name that was looked at may mean another address a moment later, so where private
addresses are not allowed the connection itself is looked at.
"""

import ipaddress
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import SplitResult, urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from vitssl.errors import DataError

_LOOK = 0.25  # seconds between two looks of the watch


class Watch:
    """``with watch.within(held, seconds)``: the socket is shut if that is not over by then, which ends in TimeoutError.

    One thread a process.
    """

    def __init__(self) -> None:
        self._begin()
        os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        self._lock, self._ends = threading.Lock(), None

    @contextmanager
    def within(self, held: socket.socket | None, seconds: float | None) -> Iterator[None]:
        if held is None or seconds is None:
            yield
            return
        with self._lock:
            if self._ends is None:
                self._ends = {}
                threading.Thread(target=self._look, args=(self._ends,), daemon=True, name="watch").start()
            key, ends = object(), self._ends
        ends[key] = time.monotonic() + seconds, held
        try:
            yield
        finally:
            if ends.pop(key, None) is None:  # what was read looks like an answer that ended, or like nonsense
                raise TimeoutError(f"no end in {seconds:g} s") from None

    def _look(self, ends: dict[object, tuple[float, socket.socket]]) -> None:
        pause = threading.Event()
        while True:
            pause.wait(_LOOK)
            for key, (end, held) in list(ends.items()):
                if time.monotonic() > end and ends.pop(key, None):
                    with suppress(OSError):  # past TLS, which another thread is reading through
                        socket.socket.shutdown(held, socket.SHUT_RDWR)


WATCH = Watch()


class _Held:
    """Keeps its socket at hand (it lets go of it as soon as a body begins), and waits for a header no longer than a timeout."""

    held: socket.socket | None = None

    def getresponse(self) -> urllib3.HTTPResponse:
        self.held = self.sock
        with WATCH.within(self.held, self.timeout):
            return super().getresponse()


class _Public(_Held):
    """Leads to no private address."""

    def connect(self) -> None:
        super().connect()
        address = self.sock.getpeername()[0]
        if not is_public(address):
            self.close()
            raise DataError(f"{self.host}: means a private address now ({address}); name the file's own address")


def pools(proxy: str, *, public: bool) -> urllib3.PoolManager:
    """Connections of one process, through a proxy if any; ``public`` ones to public addresses only (a proxy decides itself)."""
    manager = urllib3.ProxyManager(proxy, maxsize=32) if proxy else urllib3.PoolManager(maxsize=32)
    kind = _Public if public and not proxy else _Held
    plain = type("Pool", (HTTPConnectionPool,), {"ConnectionCls": type("Connection", (kind, HTTPConnection), {})})
    tls = type("TlsPool", (HTTPSConnectionPool,), {"ConnectionCls": type("TlsConnection", (kind, HTTPSConnection), {})})
    manager.pool_classes_by_scheme = {"http": plain, "https": tls}
    return manager


def host_of(parts: SplitResult) -> tuple[str, str | None, int | None]:
    """(scheme, host, port)."""
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def refusal(here: str, target: str, trusted: frozenset[str]) -> str:
    """Why what was found at the address ``here`` must not lead to ``target``; empty where it may.

    To its own host, to ``trusted`` hosts, and to any public one over https.
    """
    try:
        there, host = urlsplit(target), host_of(urlsplit(target))
    except ValueError:
        return "is no web address"
    if there.scheme not in ("http", "https") or not there.hostname:
        return "is no web address"
    if host == host_of(urlsplit(here)) or there.hostname in trusted:
        return ""
    if there.scheme != "https":
        return "is another host without https"
    return "" if _leads_to_public(there.hostname) else "is a private address"


def _leads_to_public(host: str) -> bool:
    """Whether every address of a host is one of the public network; True where it has none: connecting then says so."""
    try:
        return all(is_public(info[4][0]) for info in socket.getaddrinfo(host, None))
    except OSError:
        return True


def is_public(text: str) -> bool:
    """Whether an address is none of a private or shared network, nor the IPv4 address inside it."""
    address, inner = ipaddress.ip_address(text.partition("%")[0]), None
    if address.version == 6:
        compatible = int(address) >> 32 in (0, 0x64FF9B << 64)  # ::a.b.c.d, and NAT64's 64:ff9b::a.b.c.d
        inner = (
            address.ipv4_mapped
            or address.sixtofour
            or (ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if compatible else None)
        )
    return address.is_global and not address.is_multicast and (inner is None or inner.is_global)
