"""Vectors in memory-mapped fp16 shards, and the exact product with all of them.

    FOLDER/00000.f16    rows of E values, two bytes each, nothing else; 00001.f16 ...

A query is one pass over the map. Each thread turns a block of rows into float32, which stays in
the processor's cache, multiplies it, and keeps the best of a chunk; what is best of all is
computed once more in float64. Pages are given back as soon as they are read, so that the map
takes hardly any of the process's memory (they stay in the system's page cache).

Shapes: N rows, E embedding, Q queries, k best.
"""

import mmap
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch

from leanclip.errors import DataError

SHARD_ROWS = 262_144
BLOCK = 1024  # rows that are float32 at a time: 2 MB of 512 values
CHUNK = 32 * BLOCK  # rows of which the best are kept
MOST_QUERIES = 64  # of one pass
SPARE = 16  # more than k go into float64: float32 may swap what is nearly equal


class Vectors:
    """Rows of unit features in files of a folder.

    Args:
        folder: where the shards are, or shall be.
        width: E.
        shard_rows: rows of a shard; the same as when they were written.
    """

    def __init__(self, folder: Path, width: int, shard_rows: int = SHARD_ROWS) -> None:
        self.folder, self.width, self.shard_rows = folder, width, shard_rows
        self._maps: dict[int, tuple[mmap.mmap, torch.Tensor]] = {}

    def write(self, rows: Sequence[int], values: np.ndarray) -> None:
        """Put values (n, E) where they belong; they are on the disk when this returns."""
        values = np.ascontiguousarray(values, dtype="<f2")
        files: dict[int, int] = {}
        try:
            for row, value in zip(rows, values, strict=True):
                shard, place = divmod(row, self.shard_rows)
                if shard not in files:
                    files[shard] = os.open(self._path(shard), os.O_WRONLY | os.O_CREAT, 0o666)
                _write(files[shard], value.tobytes(), place * 2 * self.width)
            for file in files.values():
                os.fsync(file)
        finally:
            for file in files.values():
                os.close(file)

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """The values of rows, (n, E) float16.

        Raises:
            DataError: a shard is damaged.
        """
        rows = np.asarray(rows, dtype=np.int64)
        values = np.empty((len(rows), self.width), dtype=np.float16)
        shards = rows // self.shard_rows
        for shard in np.unique(shards):
            mine = shards == shard
            places = rows[mine] % self.shard_rows
            _, tensor = self._map(int(shard), int(places.max()) + 1)
            values[mine] = tensor.numpy()[places]
        return values

    def best(
        self, queries: np.ndarray, k: int, allowed: np.ndarray
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """The k rows with the largest products with each query, exactly.

        Args:
            queries: (Q, E).
            k: how many; fewer come where fewer are allowed.
            allowed: (N,) bool: rows that count.

        Returns:
            For each query its rows, and their products in float64, the largest first; of equal
            products the lower row.
        """
        rows = np.flatnonzero(allowed)
        k = min(k, len(rows))
        if not k:
            empty = (np.empty(0, np.int64), np.empty(0))
            return [empty for _ in queries]
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for first in range(0, len(queries), MOST_QUERIES):
            part = queries[first : first + MOST_QUERIES]
            if len(rows) * 8 < len(allowed):  # few: read those alone
                candidates = self._candidates_of(rows, part, k + SPARE)
            else:
                candidates = self._candidates(part, k + SPARE, allowed)
            found += [self._rescored(q, c, k) for q, c in zip(part, candidates, strict=True)]
        return found

    def _rescored(
        self, query: np.ndarray, rows: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best k of some rows for a query (E,), and their products in float64."""
        rows = np.sort(rows)
        scores = self.read(rows).astype(np.float64) @ query.astype(np.float64)
        order = np.argsort(-scores, kind="stable")[:k]
        return rows[order], scores[order]

    def _candidates(self, queries: np.ndarray, k: int, allowed: np.ndarray) -> list[np.ndarray]:
        """The best rows of a pass over all shards."""
        matrix = torch.from_numpy(np.ascontiguousarray(queries.T, dtype=np.float32))  # (E, Q)
        banned = None if allowed.all() else torch.from_numpy(~allowed)
        chunks = [
            (shard, first, min(first + CHUNK, count))
            for shard, count in self._counts(len(allowed))
            for first in range(0, count, CHUNK)
        ]

        def best_of(chunk: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
            shard, first, last = chunk
            start = shard * self.shard_rows
            rows, tensor = self._map(shard, last)
            scores = _products(tensor[first:last], matrix)  # (n, Q)
            _give_back(rows, first * 2 * self.width, last * 2 * self.width)
            if banned is not None:
                scores[banned[start + first : start + last]] = -torch.inf
            values, places = scores.topk(min(k, last - first), dim=0)
            return values, places + (start + first)

        return _merged(list(_pool().map(best_of, chunks)), k)

    def _candidates_of(self, rows: np.ndarray, queries: np.ndarray, k: int) -> list[np.ndarray]:
        """The best of some rows, which are read part by part."""
        matrix = torch.from_numpy(np.ascontiguousarray(queries.T, dtype=np.float32))
        parts = [rows[first : first + CHUNK] for first in range(0, len(rows), CHUNK)]

        def best_of(part: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
            scores = _products(torch.from_numpy(self.read(part)), matrix)
            values, places = scores.topk(min(k, len(part)), dim=0)
            return values, torch.from_numpy(part)[places]

        return _merged(list(_pool().map(best_of, parts)), k)

    def _counts(self, total: int) -> list[tuple[int, int]]:
        """Each shard and its number of rows."""
        size = self.shard_rows
        return [(n, min(size, total - n * size)) for n in range(-(-total // size))]

    def _map(self, shard: int, count: int) -> tuple[mmap.mmap, torch.Tensor]:
        """A shard's map, and its values (rows, E); mapped anew where it has grown."""
        there = self._maps.get(shard)
        if there is None or len(there[1]) < count:
            with self._path(shard).open("rb") as file:
                # A private map that could be written, which torch wants; nothing writes to it.
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            tensor = torch.frombuffer(content, dtype=torch.float16)
            rows = len(tensor) // self.width
            if rows < count:
                raise DataError(f"{self._path(shard)}: was cut short; build the index again")
            self._maps[shard] = (content, tensor[: rows * self.width].view(rows, self.width))
        return self._maps[shard]

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.f16"


def _write(file: int, content: bytes, place: int) -> None:
    done = os.pwrite(file, content, place)
    if done < len(content):  # a full disk may take a part
        os.pwrite(file, content[done:], place + done)  # and then says so


def _products(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Rows (n, E) float16 times (E, Q) float32, in float32: (n, Q)."""
    block = torch.empty(BLOCK, rows.shape[1])
    scores = torch.empty(len(rows), matrix.shape[1])
    for first in range(0, len(rows), BLOCK):
        part = rows[first : first + BLOCK]
        block[: len(part)].copy_(part)
        if matrix.shape[1] == 1:  # twice as fast as a product of matrices
            torch.mv(block[: len(part)], matrix[:, 0], out=scores[first : first + len(part), 0])
        else:
            torch.mm(block[: len(part)], matrix, out=scores[first : first + len(part)])
    return scores


def _merged(parts: list[tuple[torch.Tensor, torch.Tensor]], k: int) -> list[np.ndarray]:
    """The rows of the k largest values of each query, of parts that each have their largest."""
    values = torch.cat([part[0] for part in parts])  # (n, Q)
    rows = torch.cat([part[1] for part in parts])
    best, places = values.topk(min(k, len(values)), dim=0)
    chosen = rows.gather(0, places)
    return [chosen[best[:, q] > -torch.inf, q].numpy() for q in range(chosen.shape[1])]


def _give_back(content: mmap.mmap, first: int, last: int) -> None:
    """Let go of whole pages between two bytes of a map; they are read again when needed."""
    page = mmap.PAGESIZE
    start, end = -(-first // page) * page, last // page * page
    if end > start:
        content.madvise(mmap.MADV_DONTNEED, start, end - start)


@cache
def _pool() -> ThreadPoolExecutor:
    """A thread per CPU core, in each of which torch works alone."""
    count = max(1, len(os.sched_getaffinity(0)))
    threads, barrier = torch.get_num_threads(), threading.Barrier(count)

    def begin(_: int) -> None:
        barrier.wait()  # so that each thread comes here
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(count, thread_name_prefix="leanclip-search")
    list(pool.map(begin, range(count)))
    torch.set_num_threads(threads)  # what threads begin with that are started later
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not go along
    return pool
