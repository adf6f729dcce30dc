"""Bytes from real web servers on loopback: good ones, slow ones, broken ones and hostile ones."""

import io
import os
import pickle
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from webserver import WebServer, serving

from vitssl.data.stores.base import NoRanges, Passing, Unreachable, is_url, shown, unsigned, without_secrets
from vitssl.data.stores.connections import pools
from vitssl.data.stores.http import HttpStore
from vitssl.errors import ConfigError, DataError

CONTENT = random.Random(0).randbytes(300_000)
QUICK = {"tries": 3, "wait": 0.01, "timeout": 0.4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web")
    (folder / "a.tar").write_bytes(CONTENT)
    (folder / "empty.tar").write_bytes(b"")
    return folder


@pytest.fixture(params=[True, False], ids=["ranges", "no ranges"])
def either(request: pytest.FixtureRequest, folder: Path) -> Iterator[WebServer]:
    with serving(folder, ranges=request.param) as server:
        yield server


@pytest.fixture
def server(folder: Path) -> Iterator[WebServer]:
    with serving(folder) as server:
        yield server


def fetched(store: HttpStore, url: str) -> bytes:
    file = io.BytesIO()
    store.fetch(url, file)
    return file.getvalue()


def test_size_tag_and_all_bytes(either: WebServer) -> None:
    store, url = HttpStore(**QUICK), f"{either.url}/a.tar"
    stat = store.stat(url)
    assert (stat.size, stat.ranges) == (len(CONTENT), either.ranges) and stat.tag.startswith('"')
    assert fetched(store, url) == CONTENT
    assert store.stat(f"{either.url}/empty.tar").size == 0
    assert fetched(store, f"{either.url}/empty.tar") == b""


def test_ranges(server: WebServer) -> None:
    store, url = pickle.loads(pickle.dumps(HttpStore(**QUICK))), f"{server.url}/a.tar"
    draw = random.Random(1)
    for _ in range(30):
        offset = draw.randrange(len(CONTENT))
        length = draw.randrange(0, len(CONTENT) - offset + 1)
        assert store.read(url, offset, length) == CONTENT[offset : offset + length]
    with pytest.raises(DataError, match=r"ends before byte 300,000; it changed"):
        store.read(url, len(CONTENT) - 10, 20)


def test_connections_are_kept(server: WebServer) -> None:
    store, seen = HttpStore(**QUICK), set()
    process = server.process_request
    server.process_request = lambda request, address: (seen.add(address), process(request, address))[1]
    for place in range(20):
        store.read(f"{server.url}/a.tar", place * 1000, 1000)
    store.stat(f"{server.url}/a.tar")
    assert len(seen) == 1


PASSING = {  # faults of the first requests that patience overcomes
    "busy": ["503", "429"],
    "cut short": ["cut", "cut", "cut", "cut", "cut"],  # each brings a half of the rest
    "silent": ["stall"],
    "silent in the middle": ["stall inside"],
    "promises too much": ["says more"],
    "another place": ["another place"],
}


@pytest.mark.parametrize("case", PASSING)
def test_patience(either: WebServer, case: str) -> None:
    either.faults = {"a.tar": list(PASSING[case])}
    store, url = HttpStore(**QUICK), f"{either.url}/a.tar"
    if either.ranges:
        assert store.read(url, 1000, 200_000) == CONTENT[1000:201_000]
    either.faults = {"a.tar": list(PASSING[case])[: None if either.ranges else 2]}  # without ranges a cut gains nothing
    assert fetched(store, url) == CONTENT


LASTING = {  # faults of every request, and what is said
    "503": "status 503, 3 tries",
    "stall": "timed out",
    "drip": "bytes in",
    "another place": "other bytes than those asked for",
    "dripping header": "timed out",
    "dripping length": "no end in 0.4 s, 3 tries",
    "one byte": "the answer ended early, 3 tries",
}


@pytest.mark.parametrize("fault", LASTING)
def test_patience_ends(server: WebServer, fault: str) -> None:
    server.faults = {"a.tar": [f"always {fault}"]}
    with pytest.raises(Unreachable, match=r"/a\.tar: cannot be reached") as raised:
        HttpStore(**QUICK).read(f"{server.url}/a.tar", 1000, 1000)
    assert LASTING[fault] in str(raised.value)


REFUSED = {"404": "is not there", "403": "is forbidden", "410": "is gone", "401": "wants credentials", "418": "was refused"}


@pytest.mark.parametrize("status", REFUSED)
def test_what_will_not_change_is_told_at_once(server: WebServer, status: str) -> None:
    server.faults = {"a.tar": [f"always {status}"]}
    for ask in (lambda url: HttpStore().read(url, 0, 10), HttpStore().stat, lambda url: fetched(HttpStore(), url)):
        with pytest.raises(DataError, match=rf"a\.tar: {REFUSED[status]} \(status {status}\)") as raised:
            ask(f"{server.url}/a.tar")
        assert not isinstance(raised.value, Unreachable)
    assert len(server.requests) == 3


def test_no_server() -> None:
    with pytest.raises(Unreachable, match=r"nowhere\.tar: cannot be reached \(.*refused.*, 3 tries\)"):
        HttpStore(**QUICK).stat("http://127.0.0.1:9/nowhere.tar")


def test_servers_that_lie(server: WebServer) -> None:
    store, url = HttpStore(**QUICK), f"{server.url}/a.tar"
    server.faults = {"a.tar": ["no total"]}
    with pytest.raises(DataError, match="answers with a range of 'bytes 0-0/\\*'"):
        store.stat(url)
    server.ranges = False
    server.faults = {"a.tar": ["no length"]}
    with pytest.raises(DataError, match="does not say how long it is"):
        store.stat(url)
    with pytest.raises(NoRanges):
        store.read(url, 5, 10)


def test_redirects(server: WebServer, folder: Path) -> None:
    with serving(folder) as other:
        store, url = HttpStore(**QUICK), f"{server.url}/a.tar"
        for target in ("/a.tar", "a.tar", url):
            server.faults = {"a.tar": [f"redirect {target}"]}
            assert store.read(url, 7, 9) == CONTENT[7:16]
        cases = {
            f"{other.url}/a.tar": "another host without https",
            "https://127.0.0.1:9/a.tar": "private address",
            "https://169.254.169.254/latest/meta-data": "private address",
            "https://[::1]/a.tar": "private address",
            "https://10.1.2.3/a.tar": "private address",
            "file:///etc/passwd": "no web address",
            "ftp://example.com/a.tar": "no web address",
            "": "no web address",
        }
        for target, words in cases.items():
            server.faults = {"a.tar": [f"redirect {target}"]}
            with pytest.raises(DataError, match=words):
                store.read(url, 0, 10)
        assert not other.requests
        server.faults = {"a.tar": ["always redirect /a.tar"]}
        with pytest.raises(DataError, match="more than 5 redirects"):
            store.read(url, 0, 10)


def test_credentials_stay_with_their_host(server: WebServer, folder: Path) -> None:
    with serving(folder) as other:
        store = HttpStore(**QUICK, trusted=frozenset(["127.0.0.1"]))
        url = f"http://me:se%20cret@127.0.0.1:{server.server_port}/a.tar"
        server.faults = {"a.tar": ["redirect /a.tar", f"redirect {other.url}/a.tar"]}
        assert store.read(url, 0, 10) == CONTENT[:10]
        assert server.authorizations == ["Basic bWU6c2UgY3JldA=="] * 2 and other.authorizations == [""]
        with pytest.raises(DataError) as raised:
            store.read(url.replace("a.tar", "b.tar?signature=1"), 0, 10)
        assert "cret" not in str(raised.value) and "signature" not in str(raised.value)


def test_the_environment_s_proxy(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    store = HttpStore(**QUICK)
    assert store.read("http://far.invalid/a.tar", 5, 10) == CONTENT[5:15]
    assert store.read(f"{server.url}/a.tar", 5, 10) == CONTENT[5:15]
    monkeypatch.delenv("http_proxy")
    with pytest.raises(Unreachable):
        store.read("http://far.invalid/a.tar", 5, 10)


def test_a_child_opens_its_own_connections(server: WebServer) -> None:
    store, url = HttpStore(**QUICK), f"{server.url}/a.tar"
    store.read(url, 0, 10)
    if (child := os.fork()) == 0:
        os._exit(0 if store.read(url, 100, 50_000) == CONTENT[100:50_100] else 1)
    mine = store.read(url, 50_000, 50_000)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and mine == CONTENT[50_000:100_000]


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    """After half an answer: a part is refused, the whole is begun again."""
    file, store, other = tmp_path / "a.tar", HttpStore(**QUICK), bytes(reversed(CONTENT))
    with serving(tmp_path) as server:
        url, answer = f"{server.url}/a.tar", server.next_fault

        def change(path: str) -> str:
            if (fault := answer(path)) == "fine":
                file.write_bytes(other)
            return fault

        server.next_fault = change
        file.write_bytes(CONTENT)
        server.faults = {"a.tar": ["cut"]}
        with pytest.raises(DataError, match=r"a\.tar: changed while it was read; index it again") as raised:
            store.read(url, 0, 100_000)
        assert not isinstance(raised.value, Unreachable)
        file.write_bytes(CONTENT)
        server.faults = {"a.tar": ["cut"]}
        assert fetched(store, url) == other


def test_bodies_without_end(server: WebServer, folder: Path, tmp_path: Path) -> None:
    """Of a question for one byte, and of a file whose size is known, no more is taken than was to be expected."""
    store, url = HttpStore(**QUICK), f"{server.url}/a.tar"
    server.faults = {"a.tar": ["always endless"]}
    assert store.stat(url).size == 1000
    with pytest.raises(Passing, match=r"is longer than the 1,000 bytes it was said to have"):
        store.fetch(url, io.BytesIO(), size=1000)
    assert server.bytes < 20 << 20
    server.faults = {}
    with pytest.raises(Passing, match=r"has 300,000 bytes and was said to have 400,000"):
        store.fetch(url, io.BytesIO(), size=400_000)


def test_an_address_that_becomes_a_private_one(server: WebServer) -> None:
    """Between looking a name up and connecting to it."""
    with pytest.raises(DataError, match=r"127\.0\.0\.1: means a private address now"):
        pools("", public=True).request("GET", server.url, retries=False)
    assert not server.requests
    assert pools("", public=False).request("GET", f"{server.url}/a.tar", retries=False).data == CONTENT


def test_names() -> None:
    for path in ("http://a/b", "HTTPS://a", "s3://b/c", "hf://datasets/a", "pipe:cat x", "gs://b"):
        assert is_url(path)
    for path in ("/a/b", "a.tar", "C:\\photos", "c:/photos", "a-{0..1}.tar"):
        assert not is_url(path)
    assert shown("https://u:p@host:8/a/b.tar?sig=1#x") == "https://host:8/a/b.tar"
    assert shown("/a/b?c.tar") == "/a/b?c.tar"
    assert shown("pipe:curl -H 'token: x' https://u:p@h/a/b.tar?sig=1") == "pipe:curl ... b.tar"
    assert unsigned("https://u:p@h/a/b.tar?sig=1") == "https://u:p@h/a/b.tar" and unsigned("/a?b") == "/a?b"
    with pytest.raises(ConfigError, match=r"web servers? do(es)? not list"):
        HttpStore().find("http://a/*.tar")


SECRETS = {
    "https://me:word@h/a.tar": "https://h/a.tar",
    "https://h/a-{0,1}.tar?X-Amz-Signature=1f&X-Amz-Date=2&download=true#x": "https://h/a-{0,1}.tar?download=true#x",
    "https://h/a.tar?sv=1&sig=2%2F": "https://h/a.tar",
    "https://h/a.tar?md5=abc&expires=99&versionId=x.1": "https://h/a.tar?versionId=x.1",
    f"https://h/a.tar?v={'x' * 200}": "https://h/a.tar",
    "http://me:top@word@h/a.tar": "http://h/a.tar",
    "https://h/a.tar?hdnts=exp=1~acl=/*,hmac=secret": "https://h/a.tar",
    "pipe:curl -u me:word https://h/a.tar": "pipe:curl ... a.tar",
    "cannot open 'http://h/a?auth=1': why?": "cannot open 'http://h/a': why?",
    "/no/url?sig=1": "/no/url?sig=1",
}


def test_secrets_are_left_out() -> None:
    assert {text: without_secrets(text) for text in SECRETS} == SECRETS


HEADERS = {
    "a port that is none": "redirect https://example.com:999999/",
    "an address that is none": "redirect https://[x/",
    "a host that is none": "redirect https://x..y/",
    "NAT64 of loopback": "redirect https://[64:ff9b::7f00:1]/",
    "6to4 of loopback": "redirect https://[2002:7f00:1::]/",
    "an IPv4 address in an IPv6 one": "redirect https://[::127.0.0.1]/",
    "multicast": "redirect https://224.0.0.1/",
}


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_redirects_are_refused(server: WebServer, case: str) -> None:
    server.faults = {"a.tar": [HEADERS[case]]}
    with pytest.raises(DataError) as raised:
        HttpStore(**QUICK).read(f"{server.url}/a.tar", 0, 10)
    assert not isinstance(raised.value, Unreachable) and "\n" not in str(raised.value)
