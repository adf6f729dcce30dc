"""A real web server on loopback for the tests of remote data: serves a folder, knows ranges or not, and misbehaves on order."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit


class WebServer(ThreadingHTTPServer):
    """``faults`` are taken one a request, in order, by the path they are for ('' for any): see :class:`_Handler`."""

    daemon_threads = True

    def __init__(self, folder: Path, *, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.ranges = folder, ranges
        self.faults: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str]] = []  # (path, Range header)
        self.authorizations: list[str] = []
        self.bytes = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def next_fault(self, path: str) -> str:
        with self.lock:
            for name in (path, ""):
                if self.faults.get(name):
                    fault = self.faults[name][0]
                    if not fault.startswith("always "):
                        self.faults[name].pop(0)
                    return fault.removeprefix("always ")
        return "fine"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server: WebServer = self.server
        path = urlsplit(self.path).path.lstrip("/")  # a proxy is asked for whole urls
        said = self.headers.get("Range", "")
        with server.lock:
            server.requests.append((path, said))
            server.authorizations.append(self.headers.get("Authorization", ""))
        fault = server.next_fault(path)
        if fault.isdigit():
            return self._answer(int(fault), b"not now")
        if fault.startswith("redirect "):
            return self._answer(302, b"", Location=fault.removeprefix("redirect "))
        if fault in ("dripping header", "dripping length"):
            return self._drip(fault)
        if fault == "endless":
            return self._flood(said)
        if fault == "stall":
            time.sleep(5)
            self.close_connection = True
            return None
        file = server.folder / path
        if not file.is_file():
            return self._answer(404, b"nothing here")
        content, size, status, headers = file.read_bytes(), file.stat().st_size, 200, {"ETag": f'"{file.stat().st_mtime_ns}"'}
        if self.headers.get("If-Range", headers["ETag"]) != headers["ETag"]:
            said = ""
        if server.ranges and (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", said)):
            first, last = int(asked[1]), min(int(asked[2] or size), size - 1)
            if first >= size:
                return self._answer(416, b"", **{"Content-Range": f"bytes */{size}"})
            content, status = content[first : last + 1], 206
            if fault == "another place":
                first += 1
            if fault == "one byte":
                content, last = content[:1], first
            headers["Content-Range"] = f"bytes {first}-{last}/{size}" if fault != "no total" else f"bytes {first}-{last}/*"
        return self._answer(status, content, fault, **headers)

    def _answer(self, status: int, content: bytes, fault: str = "fine", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        length = {"says more": len(content) + 100, "says less": len(content) // 2}.get(fault, len(content))
        if fault != "no length":
            self.send_header("Content-Length", str(length))
        else:
            self.close_connection = True
        self.end_headers()
        if fault == "cut":
            content, self.close_connection = content[: max(1, len(content) // 2)], True
        if fault == "says more":
            self.close_connection = True
        if fault == "stall inside":
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            time.sleep(5)
            self.close_connection = True
            return
        if fault == "drip":
            for byte in content:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.05)
            return
        self.wfile.write(content)
        with self.server.lock:
            self.server.bytes += len(content)

    def _flood(self, said: str) -> None:
        """A body without end, whatever was asked for."""
        self.close_connection = True
        partial = b"206 Partial\r\nContent-Range: bytes 0-0/1000" if said else b"200 OK"
        self.wfile.write(b"HTTP/1.1 " + partial + b"\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(2000):
            self.wfile.write(b"10000\r\n" + bytes(65536) + b"\r\n")
            with self.server.lock:
                self.server.bytes += 65536

    def _drip(self, fault: str) -> None:
        """Never silent for long, and never done: a header without an end, or the length of a first chunk."""
        self.close_connection = True
        said = b"HTTP/1.1 206 Partial\r\nX-Long: " + b"x" * 1000
        if fault == "dripping length":
            self.wfile.write(b"HTTP/1.1 206 Partial\r\nContent-Range: bytes 1000-1999/300000\r\n")
            self.wfile.write(b"Transfer-Encoding: chunked\r\n\r\n")
            said = b"0" * 1000
        for byte in said:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            time.sleep(0.05)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextmanager
def serving(folder: Path, *, ranges: bool = True) -> Iterator[WebServer]:
    """A server of a folder, on a port of its own."""
    server = WebServer(folder, ranges=ranges)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def url(server: WebServer) -> str:
    """Its three shards."""
    return f"{server.url}/train-{{000..002}}.tar"
