"""Time and memory of reading ViT-B/32-sized weights, against each framework's own loader.

    python benchmarks/read_weights.py        # about 2 minutes, 2 GB of disk in the temp folder

The readers take turns, five rounds, the file in the page cache; every tensor is summed, so that
lazy mapping does not flatter. Each read is the first in a fresh process, as weights are read: in
one process, what malloc happens to keep of the reads before decides, by a factor of two. Peak
memory is above that of the imports, over the tensors' size. Prints JSON.
"""

import argparse
import json
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

from leanclip.weights.archive import read_torch_zip
from leanclip.weights.formats import read_safetensors
from leanclip.weights.unpickle import read_numpy_pickle

ROUNDS = 5
FILES = ("weights.pt", "weights.pdparams", "weights.safetensors")


def plain_pickle(path: Path) -> object:
    """What paddle.load does, which runs whatever the file says."""
    with path.open("rb") as file:
        return pickle.load(file)


READERS: dict[str, dict[str, Callable[[Path], object]]] = {
    "weights.pt": {
        "leanclip": read_torch_zip,
        "framework": lambda path: torch.load(path, weights_only=True, mmap=False),
    },
    "weights.pdparams": {"leanclip": read_numpy_pickle, "framework": plain_pickle},
    "weights.safetensors": {
        "leanclip": lambda path: read_safetensors(path)[0],
        "framework": load_file,
    },
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


def shapes() -> dict[str, tuple[int, ...]]:
    """ViT-B/32's 302 tensors."""
    found: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, 512),
        "text_projection": (512, 512),
        "logit_scale": (),
        "token_embedding.weight": (49408, 512),
        "visual.conv1.weight": (768, 3, 32, 32),
        "visual.class_embedding": (768,),
        "visual.positional_embedding": (50, 768),
        "visual.proj": (768, 512),
    }
    norms = {"visual.ln_pre": 768, "visual.ln_post": 768, "ln_final": 512}
    for prefix, width in (("visual.transformer", 768), ("transformer", 512)):
        for i in range(12):
            block = f"{prefix}.resblocks.{i}"
            norms |= {f"{block}.ln_1": width, f"{block}.ln_2": width}
            found[f"{block}.attn.in_proj_weight"] = (3 * width, width)
            found[f"{block}.attn.in_proj_bias"] = (3 * width,)
            for name, out, into in (
                ("attn.out_proj", width, width),
                ("mlp.c_fc", 4 * width, width),
                ("mlp.c_proj", width, 4 * width),
            ):
                found[f"{block}.{name}.weight"] = (out, into)
                found[f"{block}.{name}.bias"] = (out,)
    for norm, width in norms.items():
        found |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    return found


def write_files(folder: Path) -> None:
    """The same random tensors in the three formats."""
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) for name, shape in shapes().items()}
    torch.save(tensors, folder / "weights.pt")
    save_file(tensors, folder / "weights.safetensors")
    with (folder / "weights.pdparams").open("wb") as file:
        pickle.dump({name: tensor.numpy() for name, tensor in tensors.items()}, file, protocol=4)


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
        assert len({run["sum"] for runs in apart.values() for run in runs}) == 1
        seconds = {
            r: statistics.median(run["seconds"] for run in runs) for r, runs in apart.items()
        }
        peaks = {r: statistics.median(run["peak"] for run in runs) for r, runs in apart.items()}
        results[file] = {
            "megabytes": round(path.stat().st_size / 1e6),
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
    before = peak_bytes()
    start = time.perf_counter()
    total, size = touch(READERS[path.name][reader](path))
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
