"""What comes from elsewhere, and where it is kept: one cache folder, one careful download.

URL -> path.part (goes on where it stopped) -> checksum -> path
"""

import errno
import fcntl
import hashlib
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException, InvalidURL
from pathlib import Path

from leanclip.errors import DataError

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
        path: where it shall be; `path` with `.part` holds what came so far.
        checksum: the file's MD5 or SHA-256 in hexadecimal, told apart by their length.
        progress: is called with bytes that are there and bytes in all (0: unknown).
        tries: attempts in a row that bring nothing before giving up; a refusal (an answer of
            4xx) is not tried again.
        pause: seconds after the first of them; doubled after each.

    Raises:
        FetchError: it cannot be fetched.
        DataError: it differs from its checksum, or there is no space for it.
    """
    if not url.startswith(("http://", "https://")):
        raise DataError(f"{url}: is not an http or https address")
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
        part.unlink()
        raise DataError(f"{url}: what was fetched differs from its checksum {checksum}")
    part.rename(path)
    return path


def fetch_bytes(url: str, *, limit: int, seconds: float = 30) -> bytes:
    """What is at a URL, in memory.

    Raises:
        FetchError: it cannot be fetched, or is larger than `limit` bytes.
    """
    if not is_url(url):
        raise FetchError(f"{url}: is not an http or https address")
    try:
        with urllib.request.urlopen(url, timeout=seconds) as response:
            content = response.read(limit + 1)
    except (OSError, HTTPException, ValueError) as error:
        status = error.code if isinstance(error, urllib.error.HTTPError) else None
        raise FetchError(f"{url}: cannot be fetched: {error}", status) from None
    if len(content) > limit:
        raise FetchError(f"{url}: is over the limit of {limit} bytes")
    return content


def is_url(text: str) -> bool:
    """Whether this is an address and no path."""
    return text.lower().startswith(("http://", "https://"))


def digest(path: Path, length: int = 64) -> str:
    """A file's SHA-256, or its MD5 for a `length` of 32 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5" if length == 32 else "sha256").hexdigest()


def last_use(seconds: float) -> float:
    """A kept file's time, to sort by; 0 where it is yet to come: the clock has gone back since."""
    return seconds if seconds < time.time() + 60 else 0.0


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock that a file is, among all processes and threads of this machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:  # closing would not do: a process forked meanwhile holds the file open too
            fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Try to hold the lock that a file is, until the end of this process at the latest.

    Gives whether it does, or another process has it. Processes that are forked off do not share it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            yield False
        else:
            yield True


def _transfer(url: str, part: Path, progress: Callable[[int, int], None]) -> None:
    """Add to `part` what it lacks."""
    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing is left to send: it was all there, or of another file
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return
        part.unlink()
        raise OSError(f"the server has no more than the {have} bytes that were there") from None
    with response:
        if response.status != 206:  # the server sends it from the start
            have = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise OSError(f"the server sent another part than the one from byte {have} on")
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else 0
        with part.open("ab" if have else "wb") as file:
            # What has come is kept if this is ended; at the end nothing more is waited for.
            while chunk := response.read1(min(PIECE, total - have) if total else PIECE):
                file.write(chunk)
                have += len(chunk)
                progress(have, total)
        if total and have < total:
            raise OSError(f"the connection ended after {have} of {total} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
