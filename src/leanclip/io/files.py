"""Atomic writes, locks between processes, JSON and hashes of files."""

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
    """Whether this is a URL, other than file://, and not a path."""
    return _URL.match(text) is not None


def is_lfs_pointer(content: bytes) -> bool:
    """Whether a file's content, or its start, is that of a Git LFS pointer."""
    return content.removeprefix(b"\xef\xbb\xbf").startswith(b"version https://git-lfs.")


def is_lfs_file(path: str | Path) -> bool:
    """Whether a file is a Git LFS pointer; false if it cannot be read."""
    try:
        if Path(path).stat().st_size > 1024 or not Path(path).is_file():
            return False
        return is_lfs_pointer(Path(path).read_bytes())
    except (OSError, ValueError):
        return False


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, without flushing it to the disk."""
    with atomic_write(path, is_durable=False) as part:
        part.write_text(text, encoding="utf-8")


def write_array(path: Path, array: np.ndarray) -> None:
    """As `np.save`, but a full disk is an error."""
    content = io.BytesIO()
    np.save(content, array)
    path.write_bytes(content.getbuffer())


@contextmanager
def atomic_write(
    path: Path, *, is_concurrent: bool = False, is_durable: bool = True
) -> Iterator[Path]:
    """Yield a temporary path; what was written there replaces `path` if the block succeeds.

    Args:
        path: of the file.
        is_concurrent: other processes may write the file at the same time.
        is_durable: flush it to the disk first.
    """
    part = path.with_name(f".{path.name}.{f'{os.getpid()}.' if is_concurrent else ''}part")
    try:
        yield part
        if is_durable:
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
    r"""Split a text at `\n`, `\r\n` and `\r` only.

    `str.splitlines` also splits at form feeds, U+0085, U+2028 and others.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def read_json_lines(path: Path) -> list[Any]:
    """Parse each line as JSON; empty if there is no file. Damaged lines are skipped."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return found


def read_json_object(path: Path) -> dict[str, Any]:
    """Read an object from a JSON file; empty if there is no such file or object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def digest(path: Path, length: int = 64) -> str:
    """A file's SHA-256 in hexadecimal, or its MD5 for a `length` of 32."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5" if length == 32 else "sha256").hexdigest()


def digests(paths: Iterable[Path]) -> Iterator[str]:
    """The SHA-256 of several files, in order, computed in threads."""
    with ThreadPoolExecutor() as pool:
        yield from pool.map(digest, paths)


@contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold a lock between all processes and threads of this machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path, poll_interval=0.01):
        yield


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Try to hold a lock; yields whether it was acquired.

    It is released with the block, or by the system when the process ends. Forked processes do not
    share it: filelock closes its file in them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, blocking=False)
    with suppress(Timeout):
        lock.acquire()
    try:
        yield lock.is_locked
    finally:
        lock.release()  # no effect if it was not acquired


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl that have a step."""
    lines = read_json_lines(folder / "metrics.jsonl")
    return [one for one in lines if isinstance(one, dict) and isinstance(one.get("step"), int)]
