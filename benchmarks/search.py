"""Exact search in a million vectors: time against one pass over the bytes, and memory.

    python benchmarks/search.py --out benchmarks/search.json

1,000,000 made vectors of 512 values (2,000 centres, and noise about them), as `leanclip embed`
writes them, become an index. Then, in a fresh process, in turn: one pass over the bytes of the map
(an exclusive or of 64-bit words by NumPy in one thread and in two, the faster), and searches of 1
and of 32 queries for the ten best. Memory is the resident memory (VmHWM) of a process that does
nothing but search. `--ann N` builds HNSW over the first N of the vectors, and says its recall@10.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from measuring import chosen, finish, in_own_process, in_turn, options, resident_bytes

COUNT, WIDTH, PART, K = 1_000_000, 512, 100_000, 10


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__, rounds=9)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--ann", type=int, default=100_000)
    given = chosen(parser, words)
    if given.tiny:
        given.count, given.ann, given.rounds = 2000, 0, 2
    if given.once:
        what, index, rounds = given.once
        work = {"time": measure_time, "memory": measure_memory}[what]
        print(json.dumps(work(Path(index), int(rounds))))
        return
    with tempfile.TemporaryDirectory() as folder:
        finish(measure(Path(folder), given), given)


def measure(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    seconds = build(folder / "index", folder / "embeddings", given.count)
    results: dict[str, Any] = {
        "vectors": [given.count, WIDTH],
        "seconds to build from embeddings": round(seconds, 1),
        **in_own_process(__file__, "time", folder / "index", given.rounds),
        **in_own_process(__file__, "memory", folder / "index", given.rounds),
    }
    if given.ann:
        build(folder / "few", folder / "fewer", given.ann)
        results["hnsw"] = measure_ann(folder / "few")
    return results


def build(out: Path, embeddings: Path, count: int) -> float:
    """Write vectors as `leanclip embed` does, and make an index of them; its seconds."""
    from leanclip.inference.embeddings import Index as Written
    from leanclip.inference.model import InferenceModel
    from leanclip.model import CLIP
    from leanclip.preprocess.images import Preprocess
    from leanclip.search import Index
    from leanclip.weights import fingerprint

    model = CLIP(
        embed_dim=WIDTH,
        image_resolution=32,
        vision_layers=1,
        vision_width=64,
        vision_patch_size=16,
        context_length=16,
        vocab_size=49408,
        transformer_width=64,
        transformer_heads=1,
        transformer_layers=1,
    )
    embeddings.mkdir()
    rng = np.random.default_rng(0)
    centers = unit(rng.standard_normal((2000, WIDTH), np.float32))
    for number, first in enumerate(range(0, count, PART)):
        n = min(PART, count - first)
        noise = rng.standard_normal((n, WIDTH), np.float32) / WIDTH**0.5
        rows = unit(centers[rng.integers(2000, size=n)] + noise)
        np.save(embeddings / f"{number:05d}.npy", rows.astype(np.float16))
        names = [f"{first + i:07d}.jpg" for i in range(n)]
        (embeddings / f"{number:05d}.ids.json").write_text(json.dumps(names))
    weights = fingerprint(model.state_dict())
    facts = Written(count, "", weights, WIDTH, PART, "npy", "float16")
    (embeddings / "_index.json").write_text(json.dumps(asdict(facts)))
    start = time.perf_counter()
    Index.build(embeddings, InferenceModel(model.eval(), Preprocess(32)), out).close()
    return time.perf_counter() - start


def measure_time(path: Path, rounds: int) -> dict[str, Any]:
    """Seconds of passes and of searches, in turn."""
    from leanclip.search import Index

    index = Index.open(path)
    maps = [np.memmap(file, np.uint64, "r") for file in sorted(path.glob("*.f16"))]
    size = sum(part.nbytes for part in maps)
    halves = [part[i * len(part) // 2 : (i + 1) * len(part) // 2] for part in maps for i in (0, 1)]
    pool = ThreadPoolExecutor(2)
    queries = made_queries(index, 32)
    works: dict[str, Callable[[], object]] = {
        "pass, 1 thread": lambda: [np.bitwise_xor.reduce(part) for part in maps],
        "pass, 2 threads": lambda: list(pool.map(np.bitwise_xor.reduce, halves)),
        "1 query": lambda: index.search(queries[0], k=K),
        "32 queries": lambda: index.search_many(queries, k=K),
    }
    times = in_turn(works, rounds)  # the round before the first brings it all into memory
    best = {name: min(taken) for name, taken in times.items()}
    one_pass = min(best["pass, 1 thread"], best["pass, 2 threads"])
    return {
        "bytes": size,
        "milliseconds, best": {name: round(1000 * taken, 1) for name, taken in best.items()},
        "milliseconds, median": {
            name: round(1000 * statistics.median(taken), 1) for name, taken in times.items()
        },
        "GB/s of the pass": round(size / one_pass / 1e9, 1),
        "1 query / pass": round(best["1 query"] / one_pass, 2),
        "32 queries / 32 passes": round(best["32 queries"] / one_pass / 32, 2),
    }


def measure_memory(path: Path, _: int) -> dict[str, Any]:
    """Resident megabytes of a process that searches."""
    from leanclip.search import Index

    imported = resident("VmRSS")
    index = Index.open(path)
    queries = made_queries(index, 32)
    for _ in range(3):
        index.search(queries[0], k=K)
    one = resident("VmHWM")
    index.search_many(queries, k=K)
    files = sum(file.stat().st_size for file in path.glob("*.f16"))
    return {
        "resident MB": {
            "imported": imported,
            "1 query, peak": one,
            "32 queries, peak": resident("VmHWM"),
            "the map": round(files / 2**20),
        }
    }


def measure_ann(path: Path) -> dict[str, Any]:
    """Recall@10 and milliseconds of HNSW, with pictures of the index and with random vectors."""
    from leanclip.search import Index, approximate

    index = Index.open(path)
    texts = unit(np.random.default_rng(1).standard_normal((200, WIDTH), np.float32))
    facts = approximate.build(path, index.items, index.vectors, "hnsw", 0.95, texts)
    queries = made_queries(index, 32)
    for is_approximate in (False, True):
        taken = []
        for query in queries:
            start = time.perf_counter()
            index.search(query, k=K, is_approximate=is_approximate)
            taken.append(time.perf_counter() - start)
        name = "hnsw" if is_approximate else "exact"
        facts[f"milliseconds of a query, {name}"] = round(1000 * statistics.median(taken), 2)
    return facts


def made_queries(index: Any, count: int) -> np.ndarray:
    """Vectors near some of the index's."""
    rng = np.random.default_rng(2)
    rows = index.vectors.read(rng.choice(len(index), count)).astype(np.float32)
    return unit(rows + rng.standard_normal(rows.shape, np.float32) / WIDTH**0.5)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def resident(field: str) -> int:
    return round(resident_bytes(field=field) / 2**20)


if __name__ == "__main__":
    main()
