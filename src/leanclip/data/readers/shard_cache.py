"""Shards on this disk: fetched from URLs into a cache of limited size, and indexed.

    URL -> shards-fetched/<hash of the URL>/<name>, in the cache folder -> index

A shard is fetched whole, once for all processes of this machine. Its index outlives it.
"""

import hashlib
import logging
import os
import time
from pathlib import Path

import numpy as np

from leanclip.data.readers.cached import cached, cached_path
from leanclip.data.readers.tar_index import IMAGES, build_index
from leanclip.errors import DataError, SampleError
from leanclip.io.download import FetchError, cache_folder, fetch
from leanclip.io.files import lock_file, write_array

log = logging.getLogger("leanclip")

RETRY_AFTER = 300.0  # seconds until a shard that could not be fetched is tried again
_IN_USE = 60.0  # seconds after its last use in which the eviction of a shard is logged
_KIND = f"npy-2-{'-'.join(IMAGES)}"  # which images are read depends on what Pillow has


def is_remote(shard: str) -> bool:
    """Whether a shard is named by its URL."""
    return shard.startswith(("http://", "https://"))


def shard_name(shard: str) -> str:
    """The last part of a path or URL."""
    return (shard.partition("?")[0] if is_remote(shard) else shard).rpartition("/")[2]


def beside(shard: str, name: str) -> str:
    """The path or URL of another file in a shard's folder."""
    address, mark, query = shard.partition("?") if is_remote(shard) else (shard, "", "")
    folder, slash, _ = address.rpartition("/")
    return f"{folder}{slash}{name}{mark}{query}"


def read_file(path: str) -> bytes | None:
    """The content of a small file by path or URL; None if there is none.

    Raises:
        DataError: the server does not answer, and has never sent it.
    """
    if not is_remote(path):
        return Path(path).read_bytes() if Path(path).is_file() else None
    target = fetched_path(path)
    with lock_file(target.with_name(f"{target.name}.lock")):
        try:
            fetch(path, target)
        except FetchError as error:
            if error.status is not None and 400 <= error.status < 500:
                return None
            if not target.is_file():
                raise
            log.warning("%s; the copy in the cache is used", error)
        return target.read_bytes()


def fetched_path(url: str) -> Path:
    """Where a URL's file is in the cache."""
    return _folder() / hashlib.sha256(url.encode()).hexdigest()[:32] / shard_name(url)


def fetched_shard(url: str, limit: float) -> Path:
    """A shard's file, fetched if it is not in the cache.

    Args:
        url: of a shard.
        limit: bytes of all fetched shards; the least recently used ones are evicted.

    Raises:
        SampleError: it cannot be fetched, or could not within the last RETRY_AFTER seconds.
    """
    path = fetched_path(url)
    if not path.is_file():
        with lock_file(path.with_name(f"{path.name}.lock")):
            if not path.is_file():
                _fetch(url, path)
        _evict(limit, path)
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))  # last use
    return path


def forget_failure(url: str) -> None:
    """Allow the next attempt to fetch a shard at once."""
    _failure_of(fetched_path(url)).unlink(missing_ok=True)


def shard_index(shard: str | Path, limit: float = 0) -> np.ndarray:
    """The rows of `build_index` from the cache; made, and the shard fetched, where they are not.

    Args:
        shard: its path or URL.
        limit: as of `fetched_shard`.

    Raises:
        DataError: the cache folder cannot be written.
        SampleError: as `fetched_shard`.
        OSError: the shard cannot be read.
    """
    shard = str(shard)
    source, identity = (fetched_path(shard), shard) if is_remote(shard) else (Path(shard), None)

    def write(part: Path) -> None:
        write_array(part, build_index(fetched_shard(shard, limit) if identity else source))

    return cached([source], _KIND, write, _load, identity=identity)


def is_indexed(shard: str) -> bool:
    """Whether the cache has an index of a local shard."""
    return cached_path([Path(shard)], _KIND).is_file()


def _load(path: Path) -> np.ndarray | None:
    """An index; None if a crash or a full disk left something else."""
    index = np.load(path, mmap_mode="r" if path.stat().st_size > 1 << 16 else None)
    return index if isinstance(index, np.ndarray) and index.dtype.names else None


def _fetch(url: str, path: Path) -> None:
    """Fetch a shard, unless any process failed to do so a short while ago."""
    failure = _failure_of(path)
    if failure.is_file() and 0 <= time.time() - failure.stat().st_mtime < RETRY_AFTER:
        raise SampleError("shard not fetched", failure.read_text(encoding="utf-8"))
    try:
        fetch(url, path)
    except DataError as error:
        failure.write_text(str(error), encoding="utf-8")
        raise SampleError("shard not fetched", str(error)) from None
    cached_path([path], _KIND, url).unlink(missing_ok=True)  # the file may have changed


def _evict(limit: float, new: Path) -> None:
    """Remove the least recently used shards, but not `new`, until the others fit."""
    with lock_file(_folder() / "lock"):
        now = time.time()
        stats = {path: path.stat() for path in _folder().glob("*/*.tar")}
        # A time in the future is of a clock that was set back since: long ago.
        last_use = {p: s.st_atime if s.st_atime < now + 60 else 0.0 for p, s in stats.items()}
        total = sum(stat.st_size for stat in stats.values())
        for path in sorted(stats, key=lambda path: last_use[path]):
            if total <= limit:
                break
            if path == new:
                continue
            if now - last_use[path] < _IN_USE:
                log.warning(
                    "data.cache_gigabytes=%g: is less than the shards in use, which are fetched "
                    "again and again; raise it, or lower data.shuffle_buffer",
                    limit / 1e9,
                )
            path.unlink(missing_ok=True)
            total -= stats[path].st_size


def _folder() -> Path:
    return cache_folder() / "shards-fetched"


def _failure_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.failed")
