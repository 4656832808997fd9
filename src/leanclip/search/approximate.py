"""Approximate search with FAISS (the extra `search`): faster, and its recall measured.

    pictures' features -> HNSW or IVF-PQ -> approximate.faiss
    query -> candidates of it -> their products in float64 from the map -> the best

Pictures that came after it was built are searched exactly, beside it; those that went are left
out. Filters are always searched exactly.

Shapes: N pictures, E embedding, Q queries, k best.
"""

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leanclip.errors import ConfigError
from leanclip.io.files import atomic_write, write_array
from leanclip.io.optional_imports import need
from leanclip.search.items import Items
from leanclip.search.vectors import Vectors

log = logging.getLogger("leanclip")

KINDS = ("hnsw", "ivfpq")
RECALL = 0.95  # below this it is said
FEWEST = {"hnsw": 1, "ivfpq": 10_000}  # pictures; codes of fewer cannot be learned
MAX_OUTSIDE = 0.1  # share of pictures that came later; with more, update builds it again
QUERIES = 200  # for measuring
FACT = "approximate"
_FILE, _NUMBERS = "approximate.faiss", "approximate.npy"
_PART = 65_536


class Approximate:
    """What was built, at hand; see `build`."""

    def __init__(self, folder: Path, items: Items, vectors: Vectors) -> None:
        self.items, self.vectors = items, vectors
        self.graph = _faiss().read_index(str(folder / _FILE))
        self.rows, self.numbers = np.load(folder / _NUMBERS)  # (N,) each

    def best(self, queries: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """As `Vectors.best`, but some of the rows may be others than the best."""
        numbers = self.items.numbers()
        newer = numbers > 0
        inside = self.rows[self.rows < len(numbers)]
        newer[inside] &= numbers[inside] != self.numbers[self.rows < len(numbers)]
        later = self.vectors.best(queries, k, newer) if newer.any() else None
        wanted = min(len(self.rows), max(4 * k, 100))
        if hasattr(self.graph, "hnsw"):
            self.graph.hnsw.efSearch = max(128, wanted)
        _, places = self.graph.search(np.ascontiguousarray(queries, np.float32), wanted)
        found = []
        for number, query in enumerate(queries):
            at = places[number][places[number] >= 0]
            rows = self.rows[at]
            is_there = rows < len(numbers)
            rows, at = rows[is_there], at[is_there]
            rows = rows[numbers[rows] == self.numbers[at]]
            if later is not None:
                rows = np.concatenate([rows, later[number][0]])
            found.append(self.vectors.rescored(query, rows, k))
        return found

    def fraction_outside(self) -> float:
        """The share of pictures that came after it was built."""
        numbers = self.items.numbers()
        there = int((numbers > 0).sum())
        return 1 - float(np.isin(numbers[numbers > 0], self.numbers).sum()) / max(there, 1)


def build(
    folder: Path, items: Items, vectors: Vectors, kind: str, wanted: float, texts: np.ndarray
) -> dict[str, Any]:
    """Build it, measure its recall@10 against exact search, and note both.

    Args:
        folder: of the index.
        items: of the index.
        vectors: of the index.
        kind: "hnsw" (a graph, features in fp16 once more) or "ivfpq" (cells and codes, small).
        wanted: the recall below which a warning is given.
        texts: features (Q, E) of texts to measure with, beside pictures of the index.

    Raises:
        ConfigError: faiss is missing, or `kind` is none or wants more pictures.
    """
    faiss = _faiss()
    if kind not in KINDS:
        raise ConfigError(f"--ann {kind}: known are {', '.join(KINDS)}")
    numbers = items.numbers()
    rows = np.flatnonzero(numbers > 0)
    if len(rows) < FEWEST[kind]:
        raise ConfigError(
            f"--ann {kind}: wants {FEWEST[kind]:,} pictures or more, found {len(rows):,}; search "
            f"them exactly, or take hnsw"
        )
    start = time.monotonic()
    graph = _graph(faiss, kind, rows, vectors)
    for first in range(0, len(rows), _PART):
        graph.add(vectors.read(rows[first : first + _PART]).astype(np.float32))
    with atomic_write(folder / _FILE) as part, atomic_write(folder / _NUMBERS) as other:
        faiss.write_index(graph, str(part))
        write_array(other, np.stack([rows, numbers[rows]]))
        items.note(FACT, None)  # the two files belong together
    facts = {"kind": kind, "wanted": wanted, "seconds": round(time.monotonic() - start, 1)}
    facts |= _recall(Approximate(folder, items, vectors), rows, texts)
    items.note(FACT, facts)
    warn_if_low(folder, facts)
    return facts


def warn_if_low(folder: Path, facts: dict[str, Any]) -> None:
    """Say so where the measured recall is below what was wanted."""
    if facts["recall_at_10"] < facts["wanted"]:
        log.warning(
            "%s: approximate search (%s) finds %.1f%% of the ten nearest, less than the %.0f%% "
            "that are wanted; search exactly, or build another kind",
            folder,
            facts["kind"],
            100 * facts["recall_at_10"],
            100 * facts["wanted"],
        )


def _graph(faiss: Any, kind: str, rows: np.ndarray, vectors: Vectors) -> Any:
    """An empty structure of a kind, with what it must learn first."""
    faiss.omp_set_num_threads(torch.get_num_threads())
    width, metric = vectors.width, faiss.METRIC_INNER_PRODUCT
    if kind == "hnsw":
        graph = faiss.IndexHNSWSQ(width, faiss.ScalarQuantizer.QT_fp16, 32, metric)
        graph.hnsw.efConstruction = 100
        sample = rows[:1]  # fp16 has nothing to learn
    else:
        cells = int(min(4096, len(rows) // 40))
        codes = next(n for n in (64, 32, 16, 8, 4, 2, 1) if width % (8 * n) == 0 or n == 1)
        graph = faiss.index_factory(width, f"IVF{cells},PQ{codes}", metric)
        graph.nprobe = max(8, cells // 32)
        rng = np.random.default_rng(0)
        sample = np.sort(rng.choice(rows, min(len(rows), 40 * cells), replace=False))
    graph.train(vectors.read(sample).astype(np.float32))
    return graph


def _recall(approximate: Approximate, rows: np.ndarray, texts: np.ndarray) -> dict[str, Any]:
    """The share of the ten nearest that is found, of pictures (beside themselves) and of texts."""
    vectors = approximate.vectors
    rng = np.random.default_rng(0)
    chosen = rng.choice(rows, min(len(rows), QUERIES), replace=False)
    allowed = approximate.items.numbers() > 0
    found: dict[str, Any] = {"pictures": len(rows)}
    given = {"pictures": (vectors.read(chosen).astype(np.float32), 1), "texts": (texts, 0)}
    for name, (queries, itself) in given.items():
        if not len(queries):
            continue
        k = 10 + itself
        exact = vectors.best(queries, k, allowed)
        start = time.monotonic()
        ours = approximate.best(queries, k)
        took = time.monotonic() - start
        shares = [
            (len(np.intersect1d(a[itself:], b[itself:]))) / max(1, len(a) - itself)
            for (a, _), (b, _) in zip(exact, ours, strict=True)
        ]
        found[f"recall_at_10_{name}"] = round(float(np.mean(shares)), 4)
        found[f"milliseconds_{name}"] = round(1000 * took / len(queries), 3)
    found["recall_at_10"] = min(v for name, v in found.items() if name.startswith("recall_at_10_"))
    return found


def _faiss() -> Any:
    return need("faiss", "approximate search", extra="search")
