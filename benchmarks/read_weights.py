"""Time and memory of reading ViT-B/32-sized weights, against each framework's own loader.

    python benchmarks/read_weights.py        # about 2 minutes, 2 GB of disk in the temp folder

The readers take turns, five rounds, the file in the page cache; every tensor is summed, so that
lazy mapping does not flatter. Each read is the first in a fresh process, as weights are read: in
one process, what malloc happens to keep of the reads before decides, by a factor of two. Peak
memory is above that of the imports, over the tensors' size. Prints JSON.
"""

import argparse
import json
import math
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from leanclip import CLIP, Preprocess
from leanclip.weights import Weights, read_architecture, read_weights, write_weights

ROUNDS = 5
ARCH = "ViT-B-32-quickgelu"
FILES = ("weights.pt", "weights.pdparams", "weights.safetensors", "hf")


def leanclip(path: Path) -> object:
    """What `leanclip.load` and `--load` read with, names and architecture included."""
    return read_weights(path, arch=ARCH).tensors


def plain_pickle(path: Path) -> object:
    """What paddle.load does, which runs whatever the file says."""
    with path.open("rb") as file:
        return pickle.load(file)


def transformers_model(path: Path) -> object:
    """What a person loads Hugging Face's folder with: a model, its tensors in memory."""
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(path).state_dict()


FRAMEWORKS: dict[str, Callable[[Path], object]] = {
    "weights.pt": lambda path: torch.load(path, weights_only=True, mmap=False),
    "weights.pdparams": plain_pickle,
    "weights.safetensors": load_file,
    "hf": transformers_model,
}


def main() -> None:
    """Measure all, or one reader once (in a process that this one starts)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--once", nargs=2, metavar=("READER", "FILE"))
    chosen = parser.parse_args().once
    torch.set_num_threads(1)
    if chosen:
        print(json.dumps(read_once(chosen[0], Path(chosen[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder))
        print(json.dumps(measure(Path(folder)), indent=1))


def write_files(folder: Path) -> None:
    """The same random tensors in four formats."""
    torch.manual_seed(0)
    arch = read_architecture(ARCH)
    tensors = CLIP(**arch.model_dump(mode="json")).state_dict()
    weights = Weights(folder, "leanclip", tensors, arch, Preprocess())
    torch.save(dict(tensors), folder / "weights.pt")
    save_file(dict(tensors), folder / "weights.safetensors")
    write_weights(weights, folder / "weights.pdparams", "passl")
    write_weights(weights, folder / "hf", "hf")


def touch(tensors: object) -> tuple[float, int]:
    """The sum of all values, and their size in bytes."""
    assert isinstance(tensors, dict)
    total, size = 0.0, 0
    for values in tensors.values():
        tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
        total += float(tensor.sum())
        size += tensor.numel() * tensor.element_size()
    return total, size


def measure(folder: Path) -> dict[str, object]:
    """Seconds (medians), their ratio, and peak memory over the tensors' size, per format."""
    results: dict[str, object] = {
        "machine": f"{platform.processor() or platform.machine()}, 1 thread",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rounds": ROUNDS,
    }
    for file in FILES:
        path = folder / file
        apart: dict[str, list[dict[str, float]]] = {"leanclip": [], "framework": []}
        for reader in apart:  # the page cache's warm-up
            in_own_process(reader, path)
        for _ in range(ROUNDS):
            for reader in apart:
                apart[reader].append(in_own_process(reader, path))
        sums = [run["sum"] for runs in apart.values() for run in runs]
        assert all(math.isclose(value, sums[0], rel_tol=1e-4) for value in sums), sums
        seconds = {
            r: statistics.median(run["seconds"] for run in runs) for r, runs in apart.items()
        }
        peaks = {r: statistics.median(run["peak"] for run in runs) for r, runs in apart.items()}
        results[file] = {
            "seconds": rounded(seconds),
            "ratio": round(seconds["leanclip"] / seconds["framework"], 2),
            "peak_over_size": rounded(peaks),
        }
    return results


def rounded(values: dict[str, float]) -> dict[str, float]:
    """To three places."""
    return {name: round(value, 3) for name, value in values.items()}


def in_own_process(reader: str, path: Path) -> dict[str, float]:
    """`read_once` in a fresh process."""
    command = [sys.executable, __file__, "--once", reader, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def read_once(reader: str, path: Path) -> dict[str, float]:
    """Seconds to read and sum, the sum, and peak memory above the start over the size."""
    touch({"warm-up": torch.ones(8)})
    if reader == "framework" and path.name == "hf":
        import transformers

        _ = transformers.CLIPModel  # imports count for neither side
    before = peak_bytes()
    start = time.perf_counter()
    read = leanclip if reader == "leanclip" else FRAMEWORKS[path.name]
    total, size = touch(read(path))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "sum": total, "peak": (peak_bytes() - before) / size}


def peak_bytes() -> int:
    """Peak resident memory, mapped files included.

    Not getrusage's ru_maxrss: a child starts with its parent's.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
