"""A table of a million rows: seconds to the first batch; of ten millions: resident memory.

    python benchmarks/table.py        # about 2 minutes, 0.7 GB of disk in the temp folder

Rows of a CSV, about 45 bytes each, name 16 small JPEGs. Seconds are from `open_dataset` to the
first training batch of 64, two workers, torch and leanclip imported: first with an empty cache,
then with the rows found already. Memory is of fresh processes, after 50 batches: the one that
trains, and each of two workers; RssAnon is what is its own. Prints JSON.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from leanclip.config import DataConfig
from leanclip.data import open_dataset
from leanclip.data.loader import training_batches

ROUNDS = 3
BATCHES = 50


def main() -> None:
    """Measure all, or one table once (in a process that this one starts)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--once", nargs=2, metavar=("TABLE", "BATCHES"))
    chosen = parser.parse_args().once
    torch.set_num_threads(1)
    if chosen:
        print(json.dumps(once(Path(chosen[0]), int(chosen[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder)), indent=1))


def measure(folder: Path) -> dict[str, object]:
    """Seconds for a million rows, captions and classes; memory for 100,000 and ten millions."""
    write_images(folder)
    results: dict[str, object] = {
        "machine": f"{platform.processor() or platform.machine()}, 1 thread",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rounds": ROUNDS,
    }
    for name, column in (("captions", "caption"), ("classes", "label")):
        table = write_table(folder / f"{name}.csv", 1_000_000, column)
        times: dict[str, list[float]] = {"empty cache": [], "with the cache": []}
        for number in range(ROUNDS):
            for taken in times.values():
                cache = folder / f"cache-{name}-{number}"
                taken.append(in_own_process(table, 1, cache)["first_batch"])
        results[f"seconds to the first batch, {name}"] = {
            state: round(statistics.median(taken), 3) for state, taken in times.items()
        }
    for rows in (100_000, 10_000_000):
        table = write_table(folder / f"{rows}.csv", rows, "caption")
        run = in_own_process(table, BATCHES, folder / "cache")
        results[f"{rows} rows"] = {
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


def in_own_process(table: Path, batches: int, cache: Path) -> dict:
    """`once` in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--once", str(table), str(batches)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"LEANCLIP_CACHE": str(cache)},
    )
    return json.loads(done.stdout)


def once(table: Path, count: int) -> dict[str, object]:
    """Seconds to open and to the first batch, and memory after `count` batches."""
    config = DataConfig(layout="table", root=str(table), workers=2)
    start = time.perf_counter()
    dataset = open_dataset(config)
    opened = time.perf_counter() - start
    batches = training_batches(
        dataset,
        config,
        resolution=32,
        context_length=32,
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
    status = Path(f"/proc/{process}/status").read_text()
    return {
        name: round(int(status.split(f"{name}:")[1].split()[0]) / 1024, 1)
        for name in ("VmRSS", "RssAnon")
    }


if __name__ == "__main__":
    main()
