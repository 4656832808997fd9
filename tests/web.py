"""A small web server for tests: serves a folder, with ranges, and breaks when told to."""

import re
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PIECE = 16_384  # bytes


class Server(ThreadingHTTPServer):
    """What it serves, how it misbehaves, and what it was asked."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.breaks = 0  # how many answers to cut in the middle from now on
        self.statuses: list[int] = []  # answers to give first, in place of files
        self.knows_ranges = True
        self.knows_if_range = True
        self.tags = "ETag"  # what tells that a file is the same; or "weak", ""
        self.says_length = True
        self.pause = 0.0  # seconds after each piece of an answer
        self.asked: list[tuple[str, str | None]] = []  # path, Range
        self.conditions: list[str | None] = []  # If-Range
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        pass  # a connection that was broken on purpose


class _Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        server = self.server
        wanted = self.headers.get("Range")
        path = self.path.partition("?")[0]
        condition = self.headers.get("If-Range")
        server.asked.append((path, wanted))
        server.conditions.append(condition)
        file = server.folder / path.lstrip("/")
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        if not file.is_file():
            self.send_error(404)
            return
        content, first = file.read_bytes(), 0
        tags = tags_of(content, server.tags)
        is_same = condition in (None, *tags.values()) or not server.knows_if_range
        if wanted and server.knows_ranges and is_same:
            found = re.fullmatch(r"bytes=(\d+)-", wanted)
            assert found
            first = int(found[1])
            if first >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                for name, tag in tags.items():
                    self.send_header(name, tag)
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        for name, tag in tags.items():
            self.send_header(name, tag)
        if server.says_length:
            self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        rest = content[first:]
        if server.breaks:
            server.breaks -= 1
            rest = rest[: len(rest) // 2]
        for first in range(0, len(rest), PIECE):
            self.wfile.write(rest[first : first + PIECE])
            time.sleep(server.pause)

    def log_message(self, format: str, *args: object) -> None:
        pass


def tags_of(content: bytes, kind: str = "ETag") -> dict[str, str]:
    """Headers that differ where the content does."""
    number = zlib.crc32(content)
    return {"ETag": f'W/"{number}"' if kind == "weak" else f'"{number}"'} if kind else {}


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server of a folder, in a thread of its own."""
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
