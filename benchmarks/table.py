"""A table of a million rows: seconds to the first batch; of ten millions: resident memory.

    python benchmarks/table.py --out benchmarks/table.json

Rows of a CSV, about 45 bytes each, name 16 small JPEGs. Seconds are from `open_dataset` to the
first training batch of 64, two workers, torch and leanclip imported: first with an empty cache,
then with the rows found already. Memory is of fresh processes, after 50 batches: the one that
trains, and each of two workers; RssAnon is what is its own.
"""

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from leanclip.config.data import DataConfig
from leanclip.data import open_dataset
from leanclip.data.loader import training_batches
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.text import Tokenizer
from measuring import chosen, finish, in_own_process, options, resident_bytes

BATCHES = 50


def main(words: Sequence[str] | None = None) -> None:
    """Measure all, or one table once (in a process that this one starts)."""
    given = chosen(options(__doc__, rounds=3, threads=1), words)
    if given.once:
        print(json.dumps(once(Path(given.once[0]), int(given.once[1]))))
        return
    rows = (1_000_000, 100_000, 10_000_000)
    if given.tiny:
        rows, given.rounds = (200, 100, 400), 1
    with tempfile.TemporaryDirectory() as folder:
        finish(measure(Path(folder), rows, given.rounds), given)


def measure(folder: Path, rows: tuple[int, int, int], rounds: int) -> dict[str, object]:
    """Seconds for a million rows, captions and classes; memory for 100,000 and ten millions."""
    write_images(folder)
    results: dict[str, object] = {}
    for name, column in (("captions", "caption"), ("classes", "label")):
        table = write_table(folder / f"{name}.csv", rows[0], column)
        times: dict[str, list[float]] = {"empty cache": [], "with the cache": []}
        for number in range(rounds):
            for taken in times.values():
                cache = str(folder / f"cache-{name}-{number}")
                run = in_own_process(__file__, table, 1, LEANCLIP_CACHE=cache)
                taken.append(run["first_batch"])
        results[f"seconds to the first batch, {name}"] = {
            state: round(statistics.median(taken), 3) for state, taken in times.items()
        }
    for count in rows[1:]:
        table = write_table(folder / f"{count}.csv", count, "caption")
        batches = min(BATCHES, count // 64)
        cache = str(folder / "cache")
        run = in_own_process(__file__, table, batches, LEANCLIP_CACHE=cache)
        results[f"{count} rows"] = {
            "table_mb": round(table.stat().st_size / 1e6),
            "seconds to open, empty cache": round(run["open"], 2),
            "memory_mb": run["memory"],
        }
        table.unlink()
    return results


def write_images(folder: Path) -> None:
    """Sixteen JPEGs of 128 by 96 pixels."""
    for i in range(16):
        pixels = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((128, 96)).save(folder / f"{i:02d}.jpg")


def write_table(path: Path, rows: int, column: str) -> Path:
    """A table of so many rows; a tenth of the captions are quoted."""
    with path.open("w") as file:
        file.write(f"image,{column}\n")
        for i in range(rows):
            text = f"class {i % 1000}" if column == "label" else f"a photo of the thing number {i}"
            if i % 10 == 0 and column == "caption":
                text = f'"{text}, and another"'
            file.write(f"{i % 16:02d}.jpg,{text}\n")
    return path


def once(table: Path, count: int) -> dict[str, object]:
    """Seconds to open and to the first batch, and memory after `count` batches."""
    config = DataConfig(format="table", root=str(table), workers=2)
    start = time.perf_counter()
    dataset = open_dataset(config)
    opened = time.perf_counter() - start
    batches = training_batches(
        dataset,
        config,
        preprocess=Preprocess(32),
        tokenizer=Tokenizer(32),
        truncate=True,
        batch_size=64,
        seed=0,
    )
    assert len(next(batches)[0]) == 64
    first = time.perf_counter() - start
    for batch, _ in islice(batches, count - 1):
        assert len(batch) == 64
    memory = {"main": memory_of(os.getpid())}
    for number, worker in enumerate(multiprocessing.active_children()):
        memory[f"worker {number}"] = memory_of(worker.pid or 0)
    return {"open": opened, "first_batch": first, "memory": memory}


def memory_of(process: int) -> dict[str, float]:
    """Resident megabytes of a process: all, and its own."""
    return {name: round(resident_bytes(process, name) / 2**20, 1) for name in ("VmRSS", "RssAnon")}


if __name__ == "__main__":
    main()
