"""Files derived from other files, in the cache folder until these change."""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from leanclip.errors import DataError
from leanclip.io.download import cache_folder
from leanclip.io.files import atomic_write, lock_file

T = TypeVar("T")

_VERSION = 4  # of the files' content; part of their names


def cached(
    sources: Sequence[Path],
    kind: str,
    write: Callable[[Path], object],
    read: Callable[[Path], T | None],
    *,
    identity: str | None = None,
) -> T:
    """The result of `read` on a file that `write` makes, anew when a source changes.

    One process writes it while others that need it wait. It appears whole or not at all.

    Args:
        sources: the files it is derived from, known by path, size and modification time.
        kind: tells it from other files of the same sources; its first word is the suffix.
        write: writes the file to the given path.
        read: gives None or raises a ValueError where the file is damaged; it is written anew then.
        identity: identifies the sources in place of their paths and times.

    Raises:
        DataError: the cache folder cannot be written, or a source changed meanwhile.
        OSError: a source cannot be read.
    """
    path = cached_path(sources, kind, identity)
    if (found := _read(path, read)) is not None:
        return found
    try:
        with lock_file(path.with_name(f".{path.name}.lock")):
            if (found := _read(path, read)) is None:
                with atomic_write(path) as part:
                    write(part)
                found = _read(path, read)
    except OSError as error:
        if error.filename in map(str, sources):
            raise
        raise DataError(
            f"{sources[0]}: cannot write to the cache {path.parent}: {error.strerror or error}; "
            f"set LEANCLIP_CACHE to a folder with space"
        ) from None
    if found is None:
        raise DataError(f"{sources[0]}: changed while it was read; try again")
    return found


def cached_path(sources: Sequence[Path], kind: str, identity: str | None = None) -> Path:
    """The path of the file of `cached`, whether it exists or not."""
    facts: object = identity
    if facts is None:
        facts = [(path.resolve(), path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
    key = hashlib.sha256(
        repr((_VERSION, kind, facts)).encode("utf-8", "surrogateescape")
    ).hexdigest()
    suffix = kind.split("-")[0]
    return cache_folder() / "indices" / f"{sources[0].stem[:40]}-{key[:20]}.{suffix}"


def _read(path: Path, read: Callable[[Path], T | None]) -> T | None:
    with contextlib.suppress(OSError, EOFError, ValueError):
        return read(path)
    return None
