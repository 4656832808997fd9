"""Cost against size: time and memory of train, eval, embed and search at N, 2N and 4N images.

    python benchmarks/growth.py --out benchmarks/growth.json

The real command line in fresh processes, with the quickstart's model and no workers, on N JPEGs of
96 x 72 pixels with a caption each: `train` for an epoch with the retrieval test at its end, `eval`
(retrieval over all N), `embed`, `search build` (which embeds) and `search find`. Sizes take turns.
Time has a part that every start takes, so that its exponent is that of what is added:
log2((T(4N) - T(2N)) / (T(2N) - T(N))), which is 1 where it is linear; `plain` is the slope of
log T over log N. Memory is the peak of the process (VmHWM), with the slope of its logarithm.
"""

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from leanclip.config.strict_yaml import dump_yaml
from measuring import chosen, finish, options, significant, spread
from models import QUICKSTART, architecture, write_model

CODE = """
import sys
from pathlib import Path
from leanclip.cli.main import main
try:
    main(sys.argv[2:])
finally:
    status = Path("/proc/self/status").read_text()
    Path(sys.argv[1]).write_text(status.split("VmHWM:")[1].split()[0])
"""
TASKS = ("train", "eval", "embed", "search build", "search find")


def make_images(root: Path, count: int) -> None:
    """Small JPEGs, each another, with captions that all differ."""
    root.mkdir()
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((96, 72), Image.Resampling.BICUBIC)
        image.save(root / f"{number:06d}.jpg", quality=90)
        (root / f"{number:06d}.txt").write_text(f"a picture with the number {number}\n")


def words_of(task: str, folder: Path, count: int, number: int) -> list[str]:
    """The command line of a task."""
    images, model = str(folder / f"images-{count}"), str(folder / "model")
    index = str(folder / f"index-{count}-{number}")
    out = str(folder / f"{task.replace(' ', '-')}-{count}-{number}")
    match task:
        case "train":
            return ["train", "-c", str(folder / f"{count}.yaml"), "--output-dir", out]
        case "eval":
            data = f"pairs:{images}"
            return ["eval", "--model", model, "--data", data, "--task", "retrieval", "--out", out]
        case "embed":
            return ["embed", images, "--model", model, "--out", out]
        case "search build":
            return ["search", "build", images, "--model", model, "--out", index]
        case _:
            return ["search", "find", index, "a picture with the number 7"]


def run(words: list[str], folder: Path) -> tuple[float, float]:
    """Seconds, and gigabytes at the peak."""
    peak = folder / "peak"
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(peak), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{words}: {done.stderr[-2000:]}")
    return seconds, int(peak.read_text()) * 1024 / 1e9


def slope(values: Sequence[float]) -> float:
    """Of the logarithms over N, 2N, 4N."""
    return significant(float(np.polyfit([0, 1, 2], np.log2(values), 1)[0]), 3)


def added(values: Sequence[float]) -> float | None:
    """The exponent of what is added; None where the time hardly grows."""
    first, second = values[1] - values[0], values[2] - values[1]
    if first <= 0.02 * values[0] or second <= 0:
        return None
    return significant(math.log2(second / first), 3)


def measure(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    sizes = [given.images * times for times in (1, 2, 4)]
    name = "tiny" if given.tiny else QUICKSTART
    write_model(name, folder / "model")
    for count in sizes:
        make_images(folder / f"images-{count}", count)
        config = {
            "model": architecture(name),
            "data": {"format": "pairs", "root": str(folder / f"images-{count}"), "workers": 0},
            "train": {"epochs": 1, "batch_size": min(32, given.images)},
            "optimizer": {"learning_rate": 1e-4},
            "evaluate": {"retrieval": {}, "pictures": False},
        }
        (folder / f"{count}.yaml").write_text(dump_yaml(config))
    results: dict[str, Any] = {"images": sizes}
    for task in given.tasks:
        runs: dict[int, list[tuple[float, float]]] = {count: [] for count in sizes}
        for number in range(given.rounds):
            for count in sizes:
                runs[count].append(run(words_of(task, folder, count, number), folder))
        seconds = [statistics.median(s for s, _ in runs[count]) for count in sizes]
        peaks = [statistics.median(gb for _, gb in runs[count]) for count in sizes]
        results[task] = {
            "seconds": {str(count): spread([s for s, _ in runs[count]]) for count in sizes},
            "peak_gb": {
                str(count): significant(peak, 3) for count, peak in zip(sizes, peaks, strict=True)
            },
            "exponent of time": added(seconds),
            "exponent of time, plain": slope(seconds),
            "exponent of memory": slope(peaks),
        }
    return results


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__, rounds=3)
    parser.add_argument("--images", type=int, default=1000, help="N")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    given = chosen(parser, words)
    if given.tiny:
        given.images, given.rounds = 8, 1
    with TemporaryDirectory() as folder:
        finish(measure(Path(folder), given), given)


if __name__ == "__main__":
    main()
