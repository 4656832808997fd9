"""Feature vectors in one memory-mapped fp16 file, and the exact product with all of them.

    FOLDER/features.f16    rows of E values, two bytes each, nothing else

A query is one pass over the mapped file. Each thread converts a block of rows to float32, which
stays in the processor's cache, multiplies it, and keeps the best of a chunk; the best of all chunks
are scored again in float64. Of chunks in which few rows are allowed, those alone are converted.
Pages that were read through are released, so that the map takes little of the process's memory;
they stay in the system's page cache.

Shapes: N rows, E embedding, Q queries, k best, n rows of a chunk.
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

FILE = "features.f16"
BLOCK = 1024  # rows converted to float32 at a time: 2 MB of 512 values
CHUNK = 32 * BLOCK  # rows of which the best are kept
MAX_QUERIES = 64  # of one pass
SPARE = 16  # candidates beyond k that are scored in float64: float32 may swap near-equal ones


class Vectors:
    """Rows of unit features in a file.

    Args:
        folder: where the file is, or will be.
        width: E.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.path, self.width = folder / FILE, width
        self._mapped: tuple[mmap.mmap, torch.Tensor] | None = None

    def write(self, rows: Sequence[int], values: np.ndarray) -> None:
        """Write values (n, E) to their rows; they are on the disk when this returns."""
        if not len(rows):
            return
        values = np.ascontiguousarray(values, dtype="<f2")
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            for row, value in zip(rows, values, strict=True):
                _write(file, value.tobytes(), row * 2 * self.width)
            os.fsync(file)
        finally:
            os.close(file)

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """The values of rows, (n, E) float16.

        Raises:
            DataError: the file is damaged.
        """
        values = np.empty((len(rows), self.width), dtype="<f2")
        if not len(rows):
            return values
        # Not from the map: it would keep up to a large page per row in the process's memory.
        with self.path.open("rb", buffering=0) as file:
            for row, value in zip(np.asarray(rows).tolist(), values, strict=True):
                if os.preadv(file.fileno(), [value.data], row * value.nbytes) < value.nbytes:
                    raise self._cut_short()
        return values

    def best(
        self, queries: np.ndarray, k: int, allowed: np.ndarray
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """The k rows with the largest products with each query, exactly.

        Args:
            queries: (Q, E).
            k: how many; fewer are returned where fewer are allowed.
            allowed: (N,) bool: rows to search.

        Returns:
            For each query its rows, and their products in float64, the largest first; of equal
            products the lower row first.
        """
        k = min(k, int(allowed.sum()))
        if not k:
            empty = (np.empty(0, np.int64), np.empty(0))
            return [empty for _ in queries]
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for first in range(0, len(queries), MAX_QUERIES):
            part = queries[first : first + MAX_QUERIES]
            candidates = self._candidates(part, k + SPARE, allowed)
            found += [self._rescored(*pair, k) for pair in zip(part, candidates.T, strict=True)]
        return found

    def _rescored(
        self, query: np.ndarray, rows: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best k of some rows for a query (E,), and their products in float64."""
        rows = np.sort(rows)
        scores = self.read(rows).astype(np.float64) @ query.astype(np.float64)
        order = np.argsort(-scores, kind="stable")[:k]
        return rows[order], scores[order]

    def _candidates(self, queries: np.ndarray, k: int, allowed: np.ndarray) -> np.ndarray:
        """The rows of the k largest products in float32, (k, Q), of a pass over the file."""
        matrix = torch.from_numpy(np.ascontiguousarray(queries.T, dtype=np.float32))  # (E, Q)
        content, values = self._map(len(allowed))

        def best_of(first: int) -> tuple[torch.Tensor, torch.Tensor]:
            mask = allowed[first : first + CHUNK]
            chunk = values[first : first + len(mask)]
            places = torch.from_numpy(np.flatnonzero(mask))
            is_sparse = 8 * len(places) < len(mask)
            # For one query, converting all is faster than picking more than an eighth.
            if is_sparse or (len(queries) > 1 and 2 * len(places) < len(mask)):
                scores = _products(chunk, matrix, places)
            else:
                scores = _products(chunk, matrix)
                if len(places) < len(mask):
                    scores = scores.index_select(0, places)
            if not is_sparse:  # mapping pages again costs more than few products
                _release(content, first * 2 * self.width, (first + len(mask)) * 2 * self.width)
            best, at = scores.topk(min(k, len(places)), dim=0)
            return best, places[at] + first

        parts = list(_pool().map(best_of, range(0, len(allowed), CHUNK)))
        best = torch.cat([scores for scores, _ in parts])  # (n, Q)
        rows = torch.cat([rows for _, rows in parts])
        return rows.gather(0, best.topk(min(k, len(best)), dim=0).indices).numpy()

    def _map(self, count: int) -> tuple[mmap.mmap, torch.Tensor]:
        """The mapped file, and its values (rows, E); mapped again where it has grown."""
        mapped = self._mapped
        if mapped is None or len(mapped[1]) < count:
            with self.path.open("rb") as file:
                # A private map that could be written, which torch wants; nothing writes to it.
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            values = torch.frombuffer(content, dtype=torch.uint8)
            rows = len(values) // (2 * self.width)
            if rows < count:
                raise self._cut_short()
            values = values[: rows * 2 * self.width].view(torch.float16).view(rows, self.width)
            mapped = self._mapped = content, values
        return mapped

    def _cut_short(self) -> DataError:
        return DataError(f"{self.path}: was cut short; build the index again")


def _write(file: int, content: bytes, place: int) -> None:
    done = os.pwrite(file, content, place)
    if done < len(content):  # a full disk may take a part
        os.pwrite(file, content[done:], place + done)  # and then raises


def _products(
    rows: torch.Tensor, matrix: torch.Tensor, places: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows (n, E) float16, or those at places, times (E, Q) float32, in float32: (n, Q)."""
    count = len(rows) if places is None else len(places)
    block = torch.empty(BLOCK, rows.shape[1])
    scores = torch.empty(count, matrix.shape[1])
    for first in range(0, count, BLOCK):
        which = slice(first, first + BLOCK)
        part = rows[which] if places is None else rows.index_select(0, places[which])
        block[: len(part)].copy_(part)
        if matrix.shape[1] == 1:  # twice as fast as a product of matrices
            torch.mv(block[: len(part)], matrix[:, 0], out=scores[which, 0])
        else:
            torch.mm(block[: len(part)], matrix, out=scores[which])
    return scores


def _release(content: mmap.mmap, first: int, last: int) -> None:
    """Release whole pages between two bytes of a map; they are read again when needed."""
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
        barrier.wait()  # so that every thread runs this
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(count, thread_name_prefix="leanclip-search")
    list(pool.map(begin, range(count)))
    torch.set_num_threads(threads)  # the default of threads started later
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads are not forked
    return pool
