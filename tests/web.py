"""A small web server for tests: serves a folder, with ranges, and breaks when told to."""

import re
import threading
import time
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
        self.says_length = True
        self.pause = 0.0  # seconds after each piece of an answer
        self.asked: list[tuple[str, str | None]] = []  # path, Range
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
        server.asked.append((path, wanted))
        file = server.folder / path.lstrip("/")
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        if not file.is_file():
            self.send_error(404)
            return
        content, first = file.read_bytes(), 0
        if wanted and server.knows_ranges:
            found = re.fullmatch(r"bytes=(\d+)-", wanted)
            assert found
            first = int(found[1])
            if first >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
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
