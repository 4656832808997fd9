"""Which addresses are connected to: none of a private network for a stranger's URL."""

import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from web import Server, serving

import leanclip
from leanclip.errors import DataError
from leanclip.inference.inputs import to_source
from leanclip.io.addresses import is_public
from leanclip.io.download import FetchError, fetch, fetch_bytes

PUBLIC = "93.184.216.34"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "file").write_bytes(b"content")
    with serving(tmp_path) as server:
        yield server


def looks_up(*answers: str | list[str]) -> Callable[..., list[Any]]:
    """A resolver that gives one answer after the other, and then the last again."""
    left = list(answers)

    def resolve(host: str, port: int, *_: int) -> list[Any]:
        answer = left.pop(0) if len(left) > 1 else left[0]
        each = [answer] if isinstance(answer, str) else answer
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in each]

    return resolve


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1"),
        *("169.254.169.254", "100.64.0.1", "224.0.0.1", "255.255.255.255", "192.0.2.1"),
        *("::1", "::", "fe80::1%eth0", "fc00::1", "fd12::1", "ff02::1", "2001:db8::1"),
        *("::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::a00:1", "2002:a00:1::1", "name", ""),
    ],
)
def test_addresses_that_are_not_the_internets(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", PUBLIC, "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_addresses_that_are(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
        "[::ffff:127.0.0.1]",
        "%31%32%37.0.0.1",
        "%6cocalhost",
    ],
)
def test_a_strangers_url_leads_to_nothing_private(server: Server, host: str) -> None:
    """All these forms reach the server, as the second try shows."""
    url = f"http://{host}:{server.server_address[1]}/file"
    with pytest.raises(FetchError, match=r"not a public address.*; allow_urls='private'"):
        fetch_bytes(url, limit=100)
    assert server.asked == []
    assert fetch_bytes(url, limit=100, private=True) == b"content"


def test_a_name_that_stands_for_a_private_address(server: Server) -> None:
    url = f"http://pictures.example:{server.server_address[1]}/file"
    for answer in ("127.0.0.1", [PUBLIC, "127.0.0.1"]):
        with pytest.raises(FetchError, match=r"pictures\.example is 127\.0\.0\.1"):
            fetch_bytes(url, limit=100, resolve=looks_up(answer))
    assert server.asked == []
    found = fetch_bytes(url, limit=100, private=True, resolve=looks_up("127.0.0.1"))
    assert found == b"content"


def test_a_name_is_looked_up_once(server: Server) -> None:
    """Whoever answers with a public address first, and with a private one next, gets nothing."""
    asked: list[str] = []
    answers = looks_up(PUBLIC, "127.0.0.1")

    def resolve(host: str, port: int, *more: int) -> list[Any]:
        asked.append(host)
        return answers(host, port, *more)

    url = f"http://pictures.example:{server.server_address[1]}/file"
    with pytest.raises(FetchError):  # nothing answers there
        fetch_bytes(url, limit=100, seconds=1, resolve=resolve)
    assert (asked, server.asked) == (["pictures.example"], [])


class _Redirecting(BaseHTTPRequestHandler):
    target = ""

    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", self.target)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def redirecting() -> Iterator[Callable[[str], str]]:
    """A server that sends on to an address; gives its own."""
    handler = type("Handler", (_Redirecting,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def to(target: str) -> str:
        handler.target = target
        return f"http://front.example:{server.server_address[1]}/"

    yield to
    server.shutdown()
    server.server_close()


def test_redirects_are_checked_like_the_first_address(server: Server, redirecting: Any) -> None:
    def resolve(host: str, port: int, *_: int) -> list[Any]:
        place = "127.0.0.1" if host == "front.example" else host
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (place, port))]

    url = redirecting(f"{server.url}/file")
    found = fetch_bytes(url, limit=100, private=True, resolve=resolve)
    assert found == b"content"
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x"):
        with pytest.raises(FetchError):
            fetch_bytes(redirecting(target), limit=100, private=True, resolve=resolve)


def test_a_public_address_does_not_redirect_to_a_private_one(
    server: Server, redirecting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine has no public address: for once, the first server's counts as one."""
    front = int(redirecting(f"{server.url}/file").rpartition(":")[2].strip("/"))

    class Front(str):
        pass

    def resolve(host: str, port: int, *_: int) -> list[Any]:
        place = Front("127.0.0.1") if port == front else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (place, port))]

    monkeypatch.setattr("leanclip.io.addresses.is_public", lambda place: isinstance(place, Front))
    url = redirecting(f"{server.url}/file")
    with pytest.raises(FetchError, match="not a public address"):
        fetch_bytes(url, limit=100, resolve=resolve)
    assert server.asked == []


def test_a_url_that_the_user_names_may_be_of_his_own_network(
    server: Server, tmp_path: Path
) -> None:
    assert fetch(f"{server.url}/file", tmp_path / "x").read_bytes() == b"content"


def test_a_proxy_is_asked_for_names_but_for_no_private_number(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    for host in ("10.0.0.1", "0xa000001", "localhost", "[fd00::1]"):
        with pytest.raises(FetchError, match="not a public address"):
            fetch_bytes(f"http://{host}/file", limit=100)
    assert server.asked == []
    with pytest.raises(FetchError, match="404"):  # it is asked for the whole URL
        fetch_bytes("http://pictures.example/file", limit=100)
    assert len(server.asked) == 1


def test_a_server_that_never_ends_is_left(tmp_path: Path) -> None:
    """A byte now and then keeps every timeout of a socket from coming."""
    listener = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
            try:
                while True:
                    connection.sendall(b"x")
                    threading.Event().wait(0.05)
            except OSError:
                pass

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    with pytest.raises(FetchError, match="over the time of 1 s"):
        fetch_bytes(url, limit=1 << 30, seconds=1, private=True)
    thread.join(10)
    assert not thread.is_alive()
    listener.close()


def test_images_by_url_follow_these_rules(server: Server) -> None:
    url = f"{server.url}/file"
    with pytest.raises(DataError, match="allow_urls=True"):
        to_source(url)
    with pytest.raises(FetchError, match="not a public address"):
        to_source(url, allow_urls=True)
    assert server.asked == []
    assert to_source(url, allow_urls="private") == b"content"
    assert "allow_urls" in (leanclip.load.__doc__ or "")
