"""What comes from elsewhere, and where it is kept: one cache folder, one careful download.

URL -> path.part (goes on where it stopped) -> checksum -> path

A transfer goes on only where the server can tell that the file is still the same: its ETag or
Last-Modified is kept in path.part.tag, and sent as If-Range (RFC 9110, section 13.1.5).
"""

import errno
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.message import Message
from email.utils import parsedate_to_datetime
from http.client import HTTPException, InvalidURL
from pathlib import Path

from leanclip.errors import DataError
from leanclip.io.files import digest, write_text

log = logging.getLogger("leanclip")

TRIES = 5  # of a transfer that does not get on; the pause between two doubles from a second on
PIECE = 1 << 20  # bytes that are asked for at once
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NOT_OURS = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)
_BUSY = (408, 425, 429)  # answers of 4xx that another time may differ


class FetchError(DataError):
    """A URL cannot be fetched; `status` is the server's answer where it gave one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def cache_folder() -> Path:
    """Where fetched files and indices are kept: $LEANCLIP_CACHE, or ~/.cache/leanclip."""
    return Path(os.environ.get("LEANCLIP_CACHE", Path.home() / ".cache" / "leanclip"))


def fetch(
    url: str,
    path: Path,
    *,
    checksum: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    tries: int = TRIES,
    pause: float = 1.0,
) -> Path:
    """Fetch a URL into a file, whole or not at all; a broken transfer is taken up where it broke.

    Args:
        url: http or https.
        path: where it shall be; `path` with `.part` holds what came so far, and with `.part.tag`
            what tells whether the file has changed.
        checksum: the file's MD5 or SHA-256 in hexadecimal, told apart by their length.
        progress: is called with bytes that are there and bytes in all (0: unknown).
        tries: attempts in a row that bring nothing before giving up; a refusal (an answer of
            4xx) is not tried again.
        pause: seconds after the first of them; doubled after each.

    Raises:
        FetchError: it cannot be fetched.
        DataError: it differs from its checksum, or there is no space for it.
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
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                raise DataError(f"{part}: no space is left for {url}; make some") from None
            if isinstance(error, OSError) and error.errno in _NOT_OURS:  # of the file alone
                raise DataError(f"{part}: cannot be written: {error.strerror}") from None
            failures = 1 if _size(part) > most else failures + 1
            most = max(most, _size(part))
            status = error.code if isinstance(error, urllib.error.HTTPError) else None
            refused = status is not None and 400 <= status < 500 and status not in _BUSY
            if refused or failures >= tries or isinstance(error, InvalidURL | ValueError):
                raise FetchError(f"{url}: cannot be fetched: {error}", status) from None
            log.warning("%s: %s; trying again", url, error)
            time.sleep(pause * 2 ** (failures - 1))
    if checksum is not None and digest(part, len(checksum)) != checksum.lower():
        _forget(part)
        raise DataError(f"{url}: what was fetched differs from its checksum {checksum}")
    part.rename(path)
    _forget(part)
    return path


def fetch_bytes(url: str, *, limit: int, seconds: float = 60) -> bytes:
    """Fetch a URL that the user named into memory.

    Args:
        url: http or https.
        limit: the most bytes it may have.
        seconds: the most that the whole transfer may take.

    Raises:
        FetchError: it cannot be fetched, is larger than `limit`, or takes longer than `seconds`.
    """
    _check_scheme(url)
    deadline = time.monotonic() + seconds
    content = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=seconds) as response:
            while chunk := response.read1(min(PIECE, limit + 1 - len(content))):
                content += chunk
                if len(content) > limit:
                    raise FetchError(f"{url}: is over the limit of {limit} bytes")
                if time.monotonic() > deadline:  # a server that dribbles meets every timeout
                    raise OSError(f"it takes longer than {seconds:g} s")
            if response.length:
                raise OSError("the connection ended before all was there")
    except (OSError, HTTPException, ValueError) as error:
        status = error.code if isinstance(error, urllib.error.HTTPError) else None
        raise FetchError(f"{url}: cannot be fetched: {error}", status) from None
    return bytes(content)


def _check_scheme(url: str) -> None:
    if not url.lower().startswith(("http://", "https://")):
        raise FetchError(f"{url}: is not an http or https address")


def _transfer(url: str, part: Path, progress: Callable[[int, int], None]) -> None:
    """Add to `part` what it lacks, or begin it anew where it may be of another file."""
    tag = _tag_of(part).read_text("utf-8") if _tag_of(part).is_file() else ""
    have = _size(part) if tag else 0
    asked = {"Range": f"bytes={have}-", "If-Range": tag} if have else {}
    request = urllib.request.Request(url, headers=asked)
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing is left to send: it was all there, or of another file
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}" and _agrees(error.headers, tag):
            return
        _forget(part)
        raise OSError(f"the server has no more than the {have} bytes that were there") from None
    with response:
        if response.status != 206:  # the server sends it from the start
            have = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            _forget(part)
            raise OSError(f"the server sent another part than the one from byte {have} on")
        elif not _agrees(response.headers, tag):  # it does not know If-Range
            _forget(part)
            raise OSError(f"the file has changed since its first {have} bytes were fetched")
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else 0
        with part.open("ab" if have else "wb") as file:
            if not have:
                write_text(_tag_of(part), _strong_tag(response.headers))
            # What has come is kept if this is ended; at the end nothing more is waited for.
            while chunk := response.read1(min(PIECE, total - have) if total else PIECE):
                file.write(chunk)
                have += len(chunk)
                progress(have, total)
        if total and have < total:
            raise OSError(f"the connection ended after {have} of {total} bytes")


def _strong_tag(headers: Message) -> str:
    """What tells for certain that a file is the same: its ETag or time of change; else nothing."""
    if tag := headers.get("ETag"):
        return tag if tag.startswith('"') else ""  # W/"...": another file may have the same
    try:
        modified = headers["Last-Modified"]
        age = parsedate_to_datetime(headers["Date"]) - parsedate_to_datetime(modified)
    except (TypeError, ValueError):
        return ""
    return modified if age.total_seconds() >= 1 else ""  # it may change again in this second


def _agrees(headers: Message, tag: str) -> bool:
    """Whether an answer is of the file with this tag, as far as it says."""
    return headers.get("ETag" if tag.startswith('"') else "Last-Modified", tag) == tag


def _tag_of(part: Path) -> Path:
    return part.with_name(part.name + ".tag")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _tag_of(part).unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
