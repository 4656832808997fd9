"""Feature vectors in a memory-mapped float16 file, and exact top-k search among them.

    FOLDER/features.f16    rows of E little-endian float16 values, nothing else

Rows are appended and never overwritten. A search is one pass over the file: blocks that fit in the
processor's cache are converted to float32 and multiplied by the queries, and the best candidates
are scored again in float64.

Shapes: N rows, E embedding, Q queries, n rows of a chunk, k results.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from leanclip.errors import DataError

FILE = "features.f16"
BLOCK = 1024  # rows converted to float32 at a time: 2 MB of 512 values
CHUNK = 32 * BLOCK  # rows whose scores are kept until the best are chosen
MAX_QUERIES = 64  # per pass
SPARE = 16  # candidates beyond k that are scored in float64: float32 may swap near-equal ones


class Vectors:
    """Rows of unit features in a file.

    Args:
        folder: the folder of the file, which is created by the first `append`.
        width: E.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.path, self.width = folder / FILE, width
        self._mapped = np.empty((0, width), np.float16)

    def append(self, values: np.ndarray) -> int:
        """Append rows (n, E), flush them to the disk, and return the number of the first."""
        row_bytes = 2 * self.width
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            first = file.seek(0, os.SEEK_END) // row_bytes
            file.seek(first * row_bytes)  # over a row cut short by a crash
            file.write(values.astype("<f2").tobytes())
            file.flush()
            os.fsync(file.fileno())
        return first

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The values of rows, (n, E) float16.

        Raises:
            DataError: the file is damaged.
        """
        return self._map(int(rows.max(initial=-1)) + 1)[rows]

    def best(
        self, queries: np.ndarray, k: int, allowed: np.ndarray
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """The k rows with the largest dot products with each query, exactly.

        Args:
            queries: (Q, E) float32.
            k: how many; fewer are returned if fewer are allowed.
            allowed: (N,) bool, the rows to search.

        Returns:
            For each query its rows and their products in float64, in descending order; rows with
            equal products are in ascending order.

        Raises:
            DataError: the file is damaged.
        """
        rows = np.flatnonzero(allowed)
        values = torch.from_numpy(self._map(len(allowed)))
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for first in range(0, len(queries), MAX_QUERIES):
            part = queries[first : first + MAX_QUERIES]
            candidates = _candidates(values, rows, part, min(k + SPARE, len(rows)))
            found += [self._rescore(*pair, k) for pair in zip(part, candidates.T, strict=True)]
        return found

    def _rescore(
        self, query: np.ndarray, rows: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        rows = np.sort(rows)
        scores = self.read(rows).astype(np.float64) @ query.astype(np.float64)
        order = np.argsort(-scores, kind="stable")[:k]
        return rows[order], scores[order]

    def _map(self, count: int) -> np.ndarray:
        """At least `count` rows of the file, mapped; mapped again if the file has grown."""
        if len(self._mapped) < count:
            size = self.path.stat().st_size // (2 * self.width)
            if size < count:
                raise DataError(f"{self.path}: the file is truncated; build the index again")
            # Copy-on-write, because torch takes no read-only arrays; nothing writes to it.
            self._mapped = np.memmap(self.path, "<f2", "c", shape=(size, self.width))
        return self._mapped


def _candidates(values: torch.Tensor, rows: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """The rows, (k, Q), with the largest products in float32 among those given."""
    weight = torch.tensor(queries)  # (Q, E)
    if len(queries) == 1:
        weight = weight[0]  # a product with a vector is twice as fast
    best, at = [torch.empty(0, len(queries))], [torch.empty(0, len(queries), dtype=torch.int64)]
    for first in range(0, len(rows), CHUNK):
        chunk = torch.from_numpy(rows[first : first + CHUNK])
        products = torch.cat(list(_products(values, chunk, weight)))  # (n,) or (n, Q)
        top = products.view(len(chunk), -1).topk(min(k, len(chunk)), dim=0)
        best.append(top.values)
        at.append(chunk[top.indices])
    chosen = torch.cat(best).topk(k, dim=0).indices
    return torch.cat(at).gather(0, chosen).numpy()


def _products(
    values: torch.Tensor, rows: torch.Tensor, queries: torch.Tensor
) -> Iterator[torch.Tensor]:
    """The products in float32 of ascending rows with queries, a block at a time."""
    buffer = torch.empty(2 * BLOCK, values.shape[1])
    for block in rows.split(BLOCK):
        start, stop = int(block[0]), int(block[-1]) + 1
        is_dense = stop - start <= len(buffer)
        part = values[start:stop] if is_dense else values.index_select(0, block)
        products = F.linear(buffer[: len(part)].copy_(part), queries)
        yield products if len(part) == len(block) else products.index_select(0, block - start)
