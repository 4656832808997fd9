"""What comes from elsewhere, and where it is kept: one cache folder, one careful download.

URL -> path.part (goes on where it stopped) -> checksum -> path
"""

import hashlib
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

from leanclip.errors import DataError

log = logging.getLogger("leanclip")

TRIES = 5  # of a transfer; the pause between two doubles from a second on


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
        tries: attempts before giving up; an answer of 4xx is not tried again.
        pause: seconds after the first attempt; doubled after each.

    Raises:
        DataError: it cannot be fetched, or differs from its checksum.
    """
    if not url.startswith(("http://", "https://")):
        raise DataError(f"{url}: is not an http or https address")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for attempt in range(tries):
        try:
            _transfer(url, part, progress)
            break
        except (OSError, HTTPException) as error:
            refused = isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500
            if refused or attempt + 1 == tries:
                raise DataError(f"{url}: cannot be fetched: {error}") from None
            log.warning("%s: %s; trying again", url, error)
            time.sleep(pause * 2**attempt)
    if checksum is not None and digest(part, len(checksum)) != checksum:
        part.unlink()
        raise DataError(f"{url}: what was fetched differs from its checksum {checksum}")
    part.rename(path)
    return path


def digest(path: Path, length: int = 64) -> str:
    """A file's SHA-256, or its MD5 for a `length` of 32 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5" if length == 32 else "sha256").hexdigest()


def _transfer(url: str, part: Path, progress: Callable[[int, int], None]) -> None:
    """Add to `part` what it lacks."""
    have = part.stat().st_size if part.is_file() else 0
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
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else 0
        with part.open("ab" if have else "wb") as file:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                have += len(chunk)
                progress(have, total)
        if total and have < total:
            raise OSError(f"the connection ended after {have} of {total} bytes")
