"""Shards made ready: fetched, looked through and counted.

    URL -> shards-fetched/<hash of it>/<name>, in the cache folder -> index

Each is fetched whole, once for all processes, in a bounded part of the disk.
"""

import hashlib
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from leanclip.config.data import DataConfig
from leanclip.data.readers.shard_list import URLS, shard_name
from leanclip.data.readers.tar_index import Remarks, is_indexed, shard_index
from leanclip.errors import DataError, SampleError
from leanclip.io.download import FetchError, cache_folder, fetch
from leanclip.io.files import lock_file
from leanclip.io.progress import ProgressBar

log = logging.getLogger("leanclip")

FAILED_FOR = 300.0  # seconds during which a shard that could not be fetched is not tried again
_IN_USE = 60.0  # seconds since its last use in which a shard is missed if it makes room


def fetched_path(url: str) -> Path:
    """Where a URL's file is kept."""
    return _folder() / hashlib.sha256(url.encode()).hexdigest()[:32] / shard_name(url)


def fetched_shard(url: str, limit: float) -> Path:
    """A shard's file, fetched if it is not there; others make room for it.

    Args:
        url: of a shard.
        limit: bytes that all fetched shards may take.

    Raises:
        SampleError: it cannot be fetched.
    """
    path = fetched_path(url)
    if not path.is_file():
        with lock_file(path.with_name(path.name + ".lock")):
            if not path.is_file():
                _fetch(url, path)
        _make_room(limit, path)
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))  # it was used now
    return path


def ready_shard(shard: str, limit: float) -> tuple[Path, np.ndarray]:
    """A shard's file and index, fetched and looked through if need be."""
    if not shard.startswith(URLS):
        return Path(shard), shard_index(Path(shard))
    path = fetched_shard(shard, limit)
    return path, shard_index(path, f"{shard} {path.stat().st_size}")


def count_samples(shards: Sequence[str], config: DataConfig) -> list[int]:
    """How many samples shards have, by looking through them."""
    limit = config.cache_gigabytes * 1e9
    local = all(not shard.startswith(URLS) for shard in shards)
    new = len(shards)
    if local:
        new = sum(not is_indexed(Path(shard)) for shard in shards)
    else:
        log.info("nothing beside the shards says how many samples they have: fetching them all")
    workers = min(len(os.sched_getaffinity(0)), new)
    counts: list[int] = []
    remarks = Remarks()
    with ExitStack() as stack:
        count = partial(_count, limit=limit)
        if local and workers > 1:  # before the bar, whose thread should not be there to be forked
            pool = stack.enter_context(ProcessPoolExecutor(workers, get_context("fork")))
            counting = pool.map(count, shards, chunksize=4)
        else:
            counting = map(count, shards)
        bar = stack.enter_context(ProgressBar("indexing shards", len(shards)))
        for size, some in counting:
            counts.append(size)
            remarks += some
            bar.update(len(counts))
    for line in remarks.lines():
        log.warning("%s: %s", Path(shards[0]).parent if len(shards) > 1 else shards[0], line)
    return counts


def _count(shard: str, limit: float) -> tuple[int, Remarks]:
    """How many samples a shard has; of a fetched one this is remembered when it is removed."""
    if not shard.startswith(URLS):
        try:
            rows = shard_index(Path(shard))
            return len(rows), Remarks.of(shard, rows)
        except OSError as error:
            raise DataError(f"{shard}: cannot be read: {error.strerror}") from None
    note = fetched_path(shard).with_suffix(".samples")
    if not note.is_file():
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(str(len(ready_shard(shard, limit)[1])))
    return int(note.read_text()), Remarks()


def forget_failure(url: str) -> None:
    """Let a shard that could not be fetched be tried again."""
    _failure_of(fetched_path(url)).unlink(missing_ok=True)


def fetched_note(url: str) -> bytes | None:
    """A small file beside shards, fetched anew; None if the server does not have it.

    Raises:
        DataError: it cannot be fetched, and was not before.
    """
    path = fetched_path(url)
    with lock_file(path.with_name(path.name + ".lock")):
        try:
            fetch(url, path)
        except FetchError as error:
            if error.status is not None and 400 <= error.status < 500:
                return None
            if not path.is_file():
                raise
            log.warning("%s; the copy from before is used", error)
        return path.read_bytes()


def _fetch(url: str, path: Path) -> None:
    """Fetch a shard, unless that failed a short while ago, maybe in another process."""
    failure = _failure_of(path)
    if failure.is_file() and 0 <= time.time() - failure.stat().st_mtime < FAILED_FOR:
        raise SampleError("shard not fetched", failure.read_text(encoding="utf-8"))
    try:
        fetch(url, path)
    except DataError as error:
        failure.write_text(str(error), encoding="utf-8")
        raise SampleError("shard not fetched", str(error)) from None


def _make_room(limit: float, new: Path) -> None:
    """Remove the shards whose last use is longest ago, but not `new`, until the rest fits."""
    with lock_file(_folder() / "lock"):
        stats = {path: path.stat() for path in _folder().glob("*/*.tar")}
        total = sum(stat.st_size for stat in stats.values())
        for path, stat in sorted(stats.items(), key=lambda item: _last_use(item[1].st_atime)):
            if total <= limit:
                break
            if path == new:
                continue
            if 0 <= time.time() - stat.st_atime < _IN_USE:
                log.warning(
                    "data.cache_gigabytes=%g: the shards in use take more, so that they are "
                    "fetched again and again; raise it, or lower data.shuffle_buffer",
                    limit / 1e9,
                )
            path.unlink(missing_ok=True)
            total -= stat.st_size


def _last_use(seconds: float) -> float:
    """A file's time, to sort by; 0 where it is in the future: the clock has gone back since."""
    return seconds if seconds < time.time() + 60 else 0.0


def _folder() -> Path:
    return cache_folder() / "shards-fetched"


def _failure_of(path: Path) -> Path:
    return path.with_name(path.name + ".failed")
