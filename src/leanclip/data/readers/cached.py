"""What is worked out once from a file and kept in the cache folder, until the file changes."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from leanclip.errors import DataError
from leanclip.io.download import cache_folder
from leanclip.io.files import atomic_write, lock_file

T = TypeVar("T")

_VERSION = 3  # of what is kept; part of its name


def cached(
    sources: Sequence[Path],
    kind: str,
    write: Callable[[Path], object],
    read: Callable[[Path], T | None],
    *,
    size: int = 0,
    identity: str | None = None,
) -> T:
    """What `read` finds in a file that `write` makes; made anew when a source changes.

    One process makes it, while others that want the same wait.

    Args:
        sources: what it is made of; they are known by path, size and time of change.
        kind: what it is, apart from others that are made of the same sources; ends its name.
        write: writes the file, given a path; it appears whole or not at all.
        read: gives what is wanted of a file that was kept; None or a ValueError where it is not
            what `write` writes: then it is made anew.
        size: about how many bytes it will have, to be refused where they do not fit.
        identity: what the sources are known by in place of their paths and times.

    Raises:
        DataError: the cache folder cannot be written, or is too full; or a source was changed
            meanwhile.
        OSError: a source cannot be read.
    """
    path = cached_path(sources, kind, identity)
    if (found := _read(path, read)) is not None:
        return found
    try:
        with lock_file(path.with_name(f".{path.name}.lock")):
            if (found := _read(path, read)) is None:
                _check_space(path.parent, size)
                with atomic_write(path) as part:
                    write(part)
                found = read(path)
    except OSError as error:
        if error.filename in map(str, sources):
            raise
        raise DataError(
            f"{sources[0]}: cannot keep what is worked out from it in {path.parent}: "
            f"{error.strerror or error}; set LEANCLIP_CACHE to a folder with room"
        ) from None
    if found is None:
        raise DataError(f"{sources[0]}: was changed while it was read; try again")
    return found


def cached_path(sources: Sequence[Path], kind: str, identity: str | None = None) -> Path:
    """Where `cached` keeps its file, whether it is there or not."""
    facts: object = identity
    if facts is None:
        facts = [(path.resolve(), path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
    key = hashlib.sha256(
        repr((_VERSION, kind, facts)).encode("utf-8", "surrogateescape")
    ).hexdigest()
    suffix = kind.split("-")[0]
    return cache_folder() / "indices" / f"{sources[0].stem[:40]}-{key[:20]}.{suffix}"


def _read(path: Path, read: Callable[[Path], T | None]) -> T | None:
    """What was kept, if it was and is whole."""
    with contextlib.suppress(OSError, EOFError, ValueError):
        return read(path)
    return None


def _check_space(folder: Path, size: int) -> None:
    stats = os.statvfs(folder)
    free = stats.f_bavail * stats.f_frsize
    if size > free:
        raise OSError(f"it needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
