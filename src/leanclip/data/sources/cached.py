"""What is worked out once from a file and kept in the cache folder, until the file changes."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from leanclip.errors import DataError
from leanclip.fetch import cache_folder

_VERSION = 1  # of what is kept; part of its name


def cached(
    sources: Sequence[Path],
    kind: str,
    write: Callable[[Path], object],
    *,
    is_whole: Callable[[Path], bool],
    size: int = 0,
) -> Path:
    """A file that `write` makes, given a path to write it to; made anew when a source changes.

    Args:
        sources: what it is made of; they are known by path, size and time of change.
        kind: what it is, apart from others that are made of the same sources; ends its name.
        write: writes the file; it appears whole or not at all.
        is_whole: whether a file that was kept is what `write` writes; else it is made anew. It
            may raise ValueError for no.
        size: about how many bytes it will have, to be refused where they do not fit.

    Raises:
        DataError: the cache folder cannot be written, or is too full.
    """
    stats = [(path.resolve(), path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
    key = hashlib.sha256(
        repr((_VERSION, kind, stats)).encode("utf-8", "surrogateescape")
    ).hexdigest()
    path = cache_folder() / "tables" / f"{sources[0].stem[:40]}-{key[:20]}.{kind.split('-')[0]}"
    if path.is_file():
        with contextlib.suppress(ValueError):
            if is_whole(path):
                return path
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_space(path.parent, size)
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise DataError(
            f"{sources[0]}: cannot keep what is worked out from it in {path.parent}: "
            f"{error.strerror or error}; set LEANCLIP_CACHE to a folder with room"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return path


def _check_space(folder: Path, size: int) -> None:
    stats = os.statvfs(folder)
    free = stats.f_bavail * stats.f_frsize
    if size > free:
        raise OSError(f"it needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
