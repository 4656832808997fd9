"""Files that are there whole or not at all, locks among processes, and what a file's hash is."""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

LFS_POINTER = "is a Git LFS pointer, not the file itself; fetch it with: git lfs pull"
URL_IN_DATA = (
    "is a URL, and URLs in data are not fetched; download the images first, for example with "
    "img2dataset"
)
_URL = re.compile(r"(?!file:)[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def is_url(text: str) -> bool:
    """Whether this is the URL of something that is not on this machine, and no path."""
    return _URL.match(text) is not None


def is_lfs_pointer(content: bytes) -> bool:
    """Whether a file's content, or its start, is what Git LFS leaves in place of a large file."""
    return content.removeprefix(b"\xef\xbb\xbf").startswith(b"version https://git-lfs.")


def is_lfs_file(path: str | Path) -> bool:
    """Whether a file is a Git LFS pointer; false where it cannot be read."""
    try:
        if Path(path).stat().st_size > 1024 or not Path(path).is_file():
            return False
        return is_lfs_pointer(Path(path).read_bytes())
    except (OSError, ValueError):
        return False


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with atomic_write(path, is_flushed=False) as part:
        part.write_text(text, encoding="utf-8")


def write_array(path: Path, array: np.ndarray) -> None:
    """As `np.save`, which says nothing when a disk is full: an error then."""
    content = io.BytesIO()
    np.save(content, array)
    path.write_bytes(content.getbuffer())


@contextmanager
def atomic_write(
    path: Path, *, by_several: bool = False, is_flushed: bool = True
) -> Iterator[Path]:
    """Where to write a file that takes its place when the block ends well.

    Args:
        path: its place.
        by_several: other processes may write it at the same time.
        is_flushed: it is on the disk before.
    """
    part = path.with_name(f".{path.name}.{f'{os.getpid()}.' if by_several else ''}part")
    try:
        yield part
        if is_flushed:
            sync(part)
        part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink()


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def split_lines(text: str) -> list[str]:
    r"""The lines of a text, each ended by `\n`, `\r\n` or `\r`, as a text file has them.

    `str.splitlines` ends one at form feeds, U+0085, U+2028 and others too.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def read_json_lines(path: Path) -> list[Any]:
    """What each line holds, as JSON; none of no file. A line cut short by a crash is left out."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return found


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no such file, or it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def digest(path: Path, length: int = 64) -> str:
    """A file's SHA-256, or its MD5 for a `length` of 32 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5" if length == 32 else "sha256").hexdigest()


def digests(paths: Iterable[Path]) -> Iterator[str]:
    """The SHA-256 of several files, which are read side by side, in their order."""
    with ThreadPoolExecutor() as pool:
        yield from pool.map(digest, paths)


@contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold the lock that a file is, among all processes and threads of this machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path, poll_interval=0.01):
        yield


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Try to hold the lock that a file is; gives whether it was acquired.

    It is released with the block, or by the system when the process ends in any way. Forked
    processes do not share it: filelock closes its file in them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, blocking=False)
    with suppress(Timeout):
        lock.acquire()
    try:
        yield lock.is_locked
    finally:
        lock.release()  # does nothing where it was not acquired


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl; one without a step is left out."""
    lines = read_json_lines(folder / "metrics.jsonl")
    return [one for one in lines if isinstance(one, dict) and isinstance(one.get("step"), int)]
