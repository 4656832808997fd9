"""A download: whole or not at all, taken up where it broke, checked."""

import errno
import hashlib
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from web import Server, serving

from leanclip.errors import DataError
from leanclip.io.download import FetchError, fetch, fetch_bytes

CONTENT = bytes(range(256)) * 4000
CHANGED = len(CONTENT) * 3 // 4  # a file that is shorter by this is shorter than half of it


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "file").write_bytes(CONTENT)
    with serving(folder) as server:
        yield server


def get(server: Server, path: Path, **more) -> Path:
    return fetch(f"{server.url}/file", path, pause=0, **more)


def test_a_file_comes_whole_and_its_progress_is_told(server: Server, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    path = tmp_path / "new" / "file"
    get(server, path, progress=lambda done, total: told.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_broken_transfer_goes_on_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.breaks = 2
    get(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    half = len(CONTENT) // 2
    ranges = [None, f"bytes={half}-", f"bytes={half + half // 2}-"]
    assert server.asked == [("/file", wanted) for wanted in ranges]


def test_a_transfer_that_gets_on_may_break_often(server: Server, tmp_path: Path) -> None:
    server.breaks = 8
    get(server, tmp_path / "file", tries=2)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert len(server.asked) == 9


def test_one_that_does_not_get_on_is_given_up(server: Server, tmp_path: Path) -> None:
    server.knows_ranges = False
    server.breaks = 100
    with pytest.raises(FetchError, match="connection ended after 512000 of 1024000 bytes"):
        get(server, tmp_path / "file", tries=3)
    assert not (tmp_path / "file").exists()
    assert len(server.asked) == 3


def begin(server: Server, path: Path) -> None:
    """Half of the file, as an earlier run left it."""
    server.breaks = 1
    with pytest.raises(FetchError):
        get(server, path, tries=1)
    server.asked.clear()
    server.conditions.clear()


@pytest.mark.parametrize("is_changed", [False, True])
@pytest.mark.parametrize("knows_if_range", [True, False])
@pytest.mark.parametrize("grows_by", [0, 1000, -CHANGED])
def test_another_run_goes_on_only_with_the_same_file(
    server: Server, tmp_path: Path, is_changed: bool, knows_if_range: bool, grows_by: int
) -> None:
    server.knows_if_range = knows_if_range
    begin(server, tmp_path / "file")
    content = CONTENT
    if is_changed:
        content = bytes(reversed(CONTENT + b"x" * grows_by))[: len(CONTENT) + grows_by]
        (server.folder / "file").write_bytes(content)
    get(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content
    assert server.asked[0] == ("/file", f"bytes={len(CONTENT) // 2}-")
    assert server.conditions[0]
    assert len(server.asked) == (2 if is_changed and not knows_if_range else 1)
    assert [path.name for path in tmp_path.glob("file*")] == ["file"]


@pytest.mark.parametrize("tags", ["weak", ""])
def test_without_a_tag_it_begins_anew(server: Server, tmp_path: Path, tags: str) -> None:
    server.tags = tags
    begin(server, tmp_path / "file")
    get(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.asked == [("/file", None)]
    (tmp_path / "other.part").write_bytes(b"of an older release")
    get(server, tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == CONTENT


def test_a_part_that_is_whole_is_only_renamed(server: Server, tmp_path: Path) -> None:
    begin(server, tmp_path / "file")
    (tmp_path / "file.part").write_bytes(CONTENT)
    get(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert len(server.asked) == 1


def test_a_part_longer_than_the_file_is_begun_anew(server: Server, tmp_path: Path) -> None:
    begin(server, tmp_path / "file")
    (tmp_path / "file.part").write_bytes(CONTENT + b"more")
    get(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_server_that_ignores_ranges(server: Server, tmp_path: Path) -> None:
    server.knows_ranges = False
    server.breaks = 1
    get(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_server_that_says_no_length(server: Server, tmp_path: Path) -> None:
    server.says_length = False
    get(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_refusal_is_not_tried_again(server: Server, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="404") as caught:
        fetch(f"{server.url}/nothing", tmp_path / "file", pause=0)
    assert caught.value.status == 404
    assert len(server.asked) == 1
    assert not list(tmp_path.glob("file*"))


def test_a_busy_server_is_tried_again(server: Server, tmp_path: Path) -> None:
    server.statuses = [503, 429, 500]
    get(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    server.statuses = [503] * 9
    with pytest.raises(FetchError, match="503"):
        get(server, tmp_path / "other", tries=3)
    assert server.statuses == [503] * 6


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_checksums(server: Server, tmp_path: Path, kind: str) -> None:
    right = hashlib.new(kind, CONTENT).hexdigest()
    get(server, tmp_path / "file", checksum=right.upper())
    wrong = right[:-1] + ("0" if right[-1] != "0" else "1")
    with pytest.raises(DataError, match="differs from its checksum"):
        get(server, tmp_path / "other", checksum=wrong)
    assert not list(tmp_path.glob("other*"))


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x/y", "pipe:true", "/etc/passwd"])
def test_other_addresses_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(DataError, match="is not an http or https address"):
        fetch_bytes(url, limit=100)
    with pytest.raises(DataError, match="is not an http or https address"):
        fetch(url, tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_an_address_that_makes_no_sense_is_not_tried_again(tmp_path: Path) -> None:
    for url in ("http://127.0.0.1:port/x", "http://[::1/x", "http://127.0.0.1/a b"):
        with pytest.raises(FetchError, match="cannot be fetched"):
            fetch(url, tmp_path / "file", pause=1000)


def test_a_full_disk_is_said_at_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(done: int, total: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(DataError, match=r"file\.part: cannot be written: No space left"):
        get(server, tmp_path / "file", progress=full)
    assert len(server.asked) == 1


def test_bytes_in_memory_have_a_limit(server: Server) -> None:
    url = f"{server.url}/file"
    assert fetch_bytes(url, limit=len(CONTENT)) == CONTENT
    with pytest.raises(FetchError, match=f"over the limit of {len(CONTENT) - 1} bytes"):
        fetch_bytes(url, limit=len(CONTENT) - 1)
    server.breaks = 1
    with pytest.raises(FetchError, match="cannot be fetched"):
        fetch_bytes(url, limit=len(CONTENT))
    with pytest.raises(FetchError, match="404") as caught:
        fetch_bytes(f"{server.url}/nothing", limit=1)
    assert caught.value.status == 404


class _Redirecting(BaseHTTPRequestHandler):
    target = ""

    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", self.target)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize("target", ["file:///etc/hostname", "data:,x", "gopher://x/"])
def test_a_redirect_leads_to_no_file(target: str, tmp_path: Path) -> None:
    handler = type("Handler", (_Redirecting,), {"target": target})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        with pytest.raises(FetchError, match="cannot be fetched"):
            fetch_bytes(url, limit=100)
        with pytest.raises(FetchError, match="cannot be fetched"):
            fetch(url, tmp_path / "file", tries=1)
        server.shutdown()


def test_a_server_that_never_ends_is_left() -> None:
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
    with pytest.raises(FetchError, match="it takes longer than 1 s"):
        fetch_bytes(url, limit=1 << 30, seconds=1)
    thread.join(10)
    assert not thread.is_alive()
    listener.close()
