"""Nearest neighbours among a million vectors: leanclip's exact product, FAISS and USearch.

    python benchmarks/search.py --out benchmarks/search.json

1,000,000 unit vectors of 512 fp16 values (2,000 centres with noise) lie in one file. Each engine
returns the ten largest inner products of 1 and of 32 queries, among all rows and among a random
30% and 1% of them. Before anything is timed, what each exact engine returns must have the scores of
a product in float64. Engines take turns in one process, with a thread per core:

- leanclip: `Vectors.best` on the memory-mapped file.
- faiss, fp16: a scalar-quantised flat index, memory-mapped; a bitmap selects rows.
- faiss, float32: a flat index in memory, with BLAS for batches; a bitmap selects rows.
- usearch: exact search in the memory-mapped array. It has no filter: selected rows are copied out.

`update` replaces 1,000 random rows until the change is on the disk; leanclip appends the new rows
and no longer searches the old ones. Memory is that of fresh processes that do nothing but search,
above their imports: all that is resident at the peak, mapped pages included, and what is the
process's own (RssAnon) at the end.

Approximate search is HNSW with 32 links (64 at the bottom) over fp16, of the first `--approximate`
vectors; leanclip searches the same exactly. Recall@10 is against the product in float64, of queries
near the vectors, and of random ones, which are far from all vectors as texts are from images.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from measuring import (
    NotTheSame,
    chosen,
    compared,
    finish,
    in_own_process,
    options,
    resident_bytes,
    significant,
)

COUNT, WIDTH, PART, K = 1_000_000, 512, 50_000, 10
REPLACED = 1000
FILTERS = {"all rows": 1.0, "30% of rows": 0.3, "1% of rows": 0.01}
CORES = len(os.sched_getaffinity(0))

Search = Callable[[np.ndarray, np.ndarray | None], np.ndarray]  # queries, mask -> rows (Q, K)
Update = Callable[[np.ndarray, np.ndarray], object]  # rows, new values


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__, rounds=9)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--approximate", type=int, default=100_000, help="vectors of HNSW; 0: none")
    given = chosen(parser, words)
    if given.tiny:
        given.count, given.approximate, given.rounds = 4000, 2000, 2
    if given.once:
        engine, folder = given.once
        print(json.dumps(measure_memory(engine, Path(folder))))
        return
    with tempfile.TemporaryDirectory() as folder:
        finish(measure(Path(folder), given), given)


def measure(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    write_vectors(folder / "features.f16", given.count)
    vectors = mapped(folder)
    queries = nearby(vectors, 32)
    results: dict[str, Any] = {"vectors": [given.count, WIDTH], "build s": {}}
    opened = {}
    for name, engine in ENGINES.items():
        with suppress(ImportError):
            start = time.perf_counter()
            engine(folder, build=True)
            if name != "usearch":  # which searches the array itself
                results["build s"][name] = significant(time.perf_counter() - start, 3)
            opened[name] = engine(folder)
    masks = {name: selected(given.count, share) for name, share in FILTERS.items()}
    for name, mask in masks.items():
        check_exact(vectors, queries, mask, {e: search for e, (search, _) in opened.items()}, name)
    results["exact"] = {
        f"{count} {'query' if count == 1 else 'queries'}, {name}": compared(
            {
                engine: lambda search=search, count=count, mask=mask: search(queries[:count], mask)
                for engine, (search, _) in opened.items()
            },
            given.rounds,
        )
        for count in (1, len(queries))
        for name, mask in masks.items()
    }
    results["memory"] = {engine: in_own_process(__file__, engine, folder) for engine in opened}
    if given.approximate:
        results["approximate"] = measure_approximate(vectors[: given.approximate], given.rounds)
    results["update"] = measure_updates(opened, vectors)
    return results


# The data


def write_vectors(path: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    centers = unit(rng.standard_normal((2000, WIDTH), np.float32))
    with path.open("wb") as file:
        for first in range(0, count, PART):
            n = min(PART, count - first)
            noise = rng.standard_normal((n, WIDTH), np.float32) / WIDTH**0.5
            rows = unit(centers[rng.integers(2000, size=n)] + noise)
            file.write(rows.astype(np.float16).tobytes())


def mapped(folder: Path) -> np.ndarray:
    return np.memmap(folder / "features.f16", np.float16, "r").reshape(-1, WIDTH)


def selected(count: int, share: float) -> np.ndarray | None:
    """A random mask with a share of the rows; None: all rows."""
    return None if share == 1 else np.random.default_rng(1).random(count) < share


def nearby(vectors: np.ndarray, count: int) -> np.ndarray:
    """Queries near some of the vectors, of values that fp16 holds, since USearch reads fp16."""
    rng = np.random.default_rng(2)
    rows = vectors[np.sort(rng.choice(len(vectors), count))].astype(np.float32)
    noise = rng.standard_normal(rows.shape, np.float32) / WIDTH**0.5
    return unit(rows + noise).astype(np.float16).astype(np.float32)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# Exact engines: each opens (or builds) what it needs in a folder with the vectors


def leanclip_engine(folder: Path, build: bool = False) -> tuple[Search, Update]:
    from leanclip.search.vectors import Vectors

    count = (folder / "features.f16").stat().st_size // 2 // WIDTH
    vectors = Vectors(folder, WIDTH)
    if build:  # its file has the format of the vectors: write them once more
        (folder / "copy").mkdir()
        copied = Vectors(folder / "copy", WIDTH)
        rows = mapped(folder)
        for first in range(0, count, PART):
            part = rows[first : first + PART]
            copied.append(part)
        copied.path.unlink()

    def search(queries: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        allowed = np.ones(count, bool) if mask is None else mask
        return np.stack([rows for rows, _ in vectors.best(queries, K, allowed)])

    return search, lambda rows, values: vectors.append(values)


def faiss_engine(folder: Path, build: bool = False, is_half: bool = True) -> tuple[Search, Update]:
    faiss: Any = import_module("faiss")  # Any: it is no dependency
    faiss.omp_set_num_threads(CORES)
    path = folder / ("half.faiss" if is_half else "float.faiss")
    if build:
        if is_half:
            index = faiss.IndexScalarQuantizer(
                WIDTH, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
            )
            index.is_trained = True  # fp16 has nothing to learn
        else:
            index = faiss.IndexFlatIP(WIDTH)
        vectors = mapped(folder)
        for first in range(0, len(vectors), PART):
            index.add(vectors[first : first + PART].astype(np.float32))
        faiss.write_index(index, str(path))
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if is_half else 0)

    def search(queries: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        if mask is None:
            return index.search(queries, K)[1]
        bits = np.packbits(mask, bitorder="little")
        selector = faiss.IDSelectorBitmap(bits)
        return index.search(queries, K, params=faiss.SearchParameters(sel=selector))[1]

    def update(rows: np.ndarray, values: np.ndarray) -> None:
        changed = faiss.read_index(str(path))  # what is mapped cannot be changed
        changed.remove_ids(rows)
        changed.add(values.astype(np.float32))
        write_synced(lambda part: faiss.write_index(changed, str(part)), path)

    return search, update


def usearch_engine(folder: Path, build: bool = False) -> tuple[Search, Update]:
    usearch: Any = import_module("usearch.index")
    vectors = mapped(folder)

    def search(queries: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        rows = None if mask is None else np.flatnonzero(mask)
        among = vectors if rows is None else vectors[rows]
        halves = queries.astype(np.float16)
        found = usearch.search(among, halves, K, "ip", exact=True, threads=CORES)
        keys = found.keys.reshape(len(queries), K).astype(np.int64)
        return keys if rows is None else rows[keys]

    def update(rows: np.ndarray, values: np.ndarray) -> None:
        writable = np.memmap(folder / "features.f16", np.float16, "r+")
        writable.reshape(-1, WIDTH)[rows] = values
        writable.flush()

    return search, update


def float_engine(folder: Path, build: bool = False) -> tuple[Search, Update]:
    return faiss_engine(folder, build, is_half=False)


ENGINES: dict[str, Callable[..., tuple[Search, Update]]] = {
    "leanclip": leanclip_engine,
    "faiss, fp16": faiss_engine,
    "faiss, float32": float_engine,
    "usearch": usearch_engine,
}


def write_synced(write: Callable[[Path], object], path: Path) -> None:
    """Replace a file; the new one is on the disk when this returns."""
    part = path.with_suffix(".part")
    write(part)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


# What is measured


def exact_scores(vectors: np.ndarray, queries: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The K largest products in float64 of each query, (Q, K), the largest first."""
    best = np.full((len(queries), K), -np.inf)
    for first in range(0, len(vectors), PART):
        scores = queries.astype(np.float64) @ vectors[first : first + PART].astype(np.float64).T
        if mask is not None:
            scores[:, ~mask[first : first + PART]] = -np.inf
        best = np.sort(np.concatenate([best, scores], axis=1), axis=1)[:, -K:]
    return best[:, ::-1]


def scores_of(vectors: np.ndarray, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The products of each query with its rows in float64, (Q, K), the largest first."""
    scores = np.einsum("qkd,qd->qk", vectors[rows].astype(np.float64), queries.astype(np.float64))
    return np.sort(scores, axis=1)[:, ::-1]


def check_exact(
    vectors: np.ndarray,
    queries: np.ndarray,
    mask: np.ndarray | None,
    engines: dict[str, Search],
    what: str,
) -> None:
    """The gate of exact search; float32 may swap what differs by less than 1e-6.

    Raises:
        NotTheSame: an engine returns other rows than the best.
    """
    expected = exact_scores(vectors, queries, mask)
    for name, search in engines.items():
        rows = search(queries, mask)
        is_allowed = mask is None or mask[rows].all()
        difference = np.abs(scores_of(vectors, queries, rows) - expected).max()
        if not is_allowed or any(len(set(row)) < K for row in rows.tolist()) or difference > 1e-6:
            raise NotTheSame(f"{name}, {what}: scores differ by {difference:.2g}")


def measure_memory(engine: str, folder: Path) -> dict[str, float]:
    """Resident megabytes of a process that searches, above those after the imports."""
    vectors = mapped(folder)
    queries = nearby(vectors, 32)
    del vectors
    with suppress(ImportError):  # the imports are of all engines, so that they are the same
        for name in ("leanclip.search.vectors", "faiss", "usearch.index"):
            import_module(name)
    before = {field: resident_bytes(field=field) for field in ("VmRSS", "RssAnon")}
    search, _ = ENGINES[engine](folder)
    for _ in range(2):
        search(queries[:1], None)
        search(queries, None)
    return {
        "peak": round((resident_bytes(field="VmHWM") - before["VmRSS"]) / 1e6),
        "own": round((resident_bytes(field="RssAnon") - before["RssAnon"]) / 1e6),
    }


def measure_updates(
    engines: dict[str, tuple[Search, Update]], vectors: np.ndarray
) -> dict[str, float]:
    """Seconds to replace rows, until they are on the disk. It changes the vectors: the last."""
    rng = np.random.default_rng(4)
    rows = np.sort(rng.choice(len(vectors), min(REPLACED, len(vectors) // 4), replace=False))
    values = unit(rng.standard_normal((len(rows), WIDTH))).astype(np.float16)
    seconds = {}
    for name, (_, update) in engines.items():
        start = time.perf_counter()
        update(rows, values)
        seconds[name] = significant(time.perf_counter() - start, 3)
    return seconds


def measure_approximate(vectors: np.ndarray, rounds: int) -> dict[str, Any]:
    """Build time, search time and recall@10 of HNSW, beside exact search in the same vectors."""
    far = np.random.default_rng(3).standard_normal((100, WIDTH)).astype(np.float16)
    given = {"near": nearby(vectors, 100), "far": unit(far.astype(np.float32))}
    built: dict[str, tuple[Search, float]] = {}
    for name, build in {"faiss, HNSW": faiss_hnsw, "usearch, HNSW": usearch_hnsw}.items():
        with suppress(ImportError):
            start = time.perf_counter()
            built[name] = build(vectors), time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        vectors.tofile(Path(folder) / "features.f16")
        built = {"leanclip": (leanclip_engine(Path(folder))[0], 0.0), **built}
        results: dict[str, Any] = {
            f"1 query, {len(vectors):,} rows": compared(
                {name: lambda s=s: s(given["near"][:1], None) for name, (s, _) in built.items()},
                rounds,
            )
        }
        for name, (search, seconds) in built.items():
            results[name] = {"build s": significant(seconds, 3)}
            for kind, queries in given.items():
                expected = exact_scores(vectors, queries, None)[:, -1:]
                found = scores_of(vectors, queries, search(queries, None))
                recall = float((found >= expected - 1e-6).mean())
                results[name][f"recall@10, {kind}"] = significant(recall, 3)
    return results


def faiss_hnsw(vectors: np.ndarray) -> Search:
    faiss: Any = import_module("faiss")  # Any: it is no dependency
    faiss.omp_set_num_threads(CORES)
    half, metric = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    graph = faiss.IndexHNSWSQ(WIDTH, half, 32, metric)
    graph.hnsw.efConstruction, graph.hnsw.efSearch = 100, 128
    graph.is_trained = graph.storage.is_trained = True
    for first in range(0, len(vectors), PART):
        graph.add(vectors[first : first + PART].astype(np.float32))
    return lambda queries, _: graph.search(queries, K)[1]


def usearch_hnsw(vectors: np.ndarray) -> Search:
    usearch: Any = import_module("usearch.index")
    graph = usearch.Index(
        ndim=WIDTH,
        metric="ip",
        dtype="f16",
        connectivity=32,
        expansion_add=100,
        expansion_search=128,
    )
    graph.add(np.arange(len(vectors)), np.ascontiguousarray(vectors), threads=CORES)

    def search(queries: np.ndarray, _: np.ndarray | None) -> np.ndarray:
        found = graph.search(queries.astype(np.float16), K, threads=CORES)
        return found.keys.reshape(len(queries), K).astype(np.int64)

    return search


if __name__ == "__main__":
    main()
