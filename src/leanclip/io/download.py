"""Downloads, resumed if interrupted, and the folder in which they are cached.

    URL -> path.part (resumed) -> checksum -> path

A transfer is resumed only if the file on the server is certain to be the same: its strong ETag is
stored in path.part.tag and sent as If-Range (RFC 9110, section 13.1.5).
"""

import errno
import logging
import os
import time
import urllib.request
from collections.abc import Callable
from email.message import Message
from http.client import HTTPException, InvalidURL
from pathlib import Path
from urllib.error import HTTPError

from leanclip.errors import DataError
from leanclip.io.files import digest, write_text

log = logging.getLogger("leanclip")

MAX_TRIES = 5  # without progress; the pause between two starts at a second and doubles
CHUNK = 1 << 20  # bytes read at once
_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}
_RETRIED = (408, 416, 425, 429)  # other answers of 4xx are final


class FetchError(DataError):
    """A URL cannot be fetched; `status` is the server's answer, if it gave one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def cache_folder() -> Path:
    """The folder for downloads and indices: $LEANCLIP_CACHE, or ~/.cache/leanclip."""
    return Path(os.environ.get("LEANCLIP_CACHE", Path.home() / ".cache" / "leanclip"))


def fetch(
    url: str,
    path: Path,
    *,
    checksum: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    tries: int = MAX_TRIES,
    pause: float = 1.0,
) -> Path:
    """Download a URL to a file, whole or not at all; an interrupted transfer is resumed.

    Args:
        url: http or https.
        path: of the file; partial downloads are in `path`.part.
        checksum: the file's MD5 or SHA-256 in hexadecimal, told apart by length.
        progress: called with the bytes received and the total (0: unknown).
        tries: consecutive attempts without progress; most answers of 4xx are not retried.
        pause: seconds after the first of these attempts; doubled after each.

    Raises:
        FetchError: it cannot be fetched.
        DataError: its checksum differs, or the file cannot be written.
    """
    _check_scheme(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    failures, most = 0, _size(part)
    while True:
        try:
            _transfer(url, part, progress)
            break
        except (OSError, HTTPException, ValueError) as error:
            if isinstance(error, OSError) and error.errno in _WRITE_ERRORS:
                raise DataError(f"{part}: cannot be written: {error.strerror}") from None
            failures = 1 if _size(part) > most else failures + 1
            most = max(most, _size(part))
            status = error.code if isinstance(error, HTTPError) else None
            is_refused = status is not None and 400 <= status < 500 and status not in _RETRIED
            if is_refused or failures >= tries or isinstance(error, InvalidURL | ValueError):
                raise FetchError(f"{url}: cannot be fetched: {error}", status) from None
            log.warning("%s: %s; trying again", url, error)
            time.sleep(pause * 2 ** (failures - 1))
    if checksum is not None and digest(part, len(checksum)) != checksum.lower():
        _discard(part)
        raise DataError(f"{url}: the downloaded file differs from its checksum {checksum}")
    part.rename(path)
    _discard(part)
    return path


def fetch_bytes(url: str, *, limit: int, seconds: float = 60) -> bytes:
    """Download a URL into memory.

    Args:
        url: http or https.
        limit: maximum size in bytes.
        seconds: maximum duration of the whole transfer.

    Raises:
        FetchError: it cannot be fetched, is larger than `limit`, or takes longer than `seconds`.
    """
    _check_scheme(url)
    deadline = time.monotonic() + seconds
    content = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=seconds) as response:
            while chunk := response.read1(min(CHUNK, limit + 1 - len(content))):
                content += chunk
                if len(content) > limit:
                    raise FetchError(f"{url}: is over the limit of {limit} bytes")
                if time.monotonic() > deadline:  # the timeout is for each read alone
                    raise OSError(f"it takes longer than {seconds:g} s")
            if response.length:
                raise OSError("the connection ended before the end of the file")
    except (OSError, HTTPException, ValueError) as error:
        status = error.code if isinstance(error, HTTPError) else None
        raise FetchError(f"{url}: cannot be fetched: {error}", status) from None
    return bytes(content)


def _check_scheme(url: str) -> None:
    if not url.lower().startswith(("http://", "https://")):
        raise FetchError(f"{url}: is not an http or https address")


def _transfer(url: str, part: Path, progress: Callable[[int, int], None]) -> None:
    """Append the missing bytes to `part`, or download all if the file may have changed."""
    tag = _tag_file(part).read_text("utf-8") if _tag_file(part).is_file() else ""
    done = _size(part) if tag else 0
    headers = {"Range": f"bytes={done}-", "If-Range": tag} if done else {}

    def is_same(answer: Message) -> bool:
        return answer.get("ETag", tag) == tag

    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
    except HTTPError as error:
        if error.code == 416:  # no bytes after these: the file is complete, or another one
            if error.headers.get("Content-Range") == f"bytes */{done}" and is_same(error.headers):
                return
            _discard(part)
        raise
    with response:
        if response.status != 206:  # the server sends the file from its start
            done = 0
        elif not (
            response.headers.get("Content-Range", "").startswith(f"bytes {done}-")
            and is_same(response.headers)  # some servers ignore If-Range
        ):
            _discard(part)
            raise OSError(f"the server did not resume the download at byte {done}")
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else 0
        with part.open("ab" if done else "wb") as file:
            if not done:
                tag = response.headers.get("ETag", "")
                write_text(_tag_file(part), tag if tag.startswith('"') else "")  # W/"..." is weak
            while chunk := response.read1(min(CHUNK, total - done) if total else CHUNK):
                file.write(chunk)
                done += len(chunk)
                progress(done, total)
        if total and done < total:
            raise OSError(f"the connection ended after {done} of {total} bytes")


def _tag_file(part: Path) -> Path:
    return part.with_name(part.name + ".tag")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _tag_file(part).unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
