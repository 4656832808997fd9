"""Time and memory of reading ViT-B/32-sized weights, against each framework's own loader.

    python benchmarks/read_weights.py --out benchmarks/read_weights.json

The readers take turns, five rounds, the file in the page cache; every tensor is summed, so that
lazy mapping does not flatter. Each read is the first in a fresh process, as weights are read: in
one process, what malloc happens to keep of the reads before decides. Peak
memory is above that of the imports, over the tensors' size, mapped files counted. Hugging Face's
format costs more than its file: queries, keys and values are joined, which copies a quarter. A
`.pdparams` of pickle protocol 2 keeps its bytes as text, which is not in the table.
"""

import json
import math
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from leanclip import Preprocess
from leanclip.weights import Weights, read_weights, write_weights
from measuring import NotTheSame, chosen, finish, in_own_process, options, peak_bytes
from models import architecture, random_model

ARCH = "ViT-B-32-quickgelu"
FILES = ("weights.pt", "weights.pdparams", "weights.safetensors", "hf")


def leanclip(path: Path) -> object:
    """What `leanclip.load` and `--load` read with, names and architecture included."""
    return read_weights(path, arch=str(path.parent / "arch.json")).tensors


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


def main(words: Sequence[str] | None = None) -> None:
    """Measure all, or one reader once (in a process that this one starts)."""
    given = chosen(options(__doc__, threads=1), words)
    if given.once:
        print(json.dumps(read_once(given.once[0], Path(given.once[1]))))
        return
    name = "tiny" if given.tiny else ARCH
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), name)
        finish(measure(Path(folder), given.rounds), given)


def write_files(folder: Path, name: str) -> None:
    """The same random tensors in four formats; the architecture beside, which not all say."""
    model = random_model(name)
    tensors = dict(model.state_dict())
    weights = Weights(folder, "leanclip", tensors, model.config, Preprocess())
    torch.save(tensors, folder / "weights.pt")
    save_file(tensors, folder / "weights.safetensors")
    write_weights(weights, folder / "weights.pdparams", "passl")
    write_weights(weights, folder / "hf", "hf")
    (folder / "arch.json").write_text(json.dumps(architecture(name)))


def touch(tensors: object) -> tuple[float, int]:
    """The sum of all values, and their size in bytes."""
    assert isinstance(tensors, dict)
    total, size = 0.0, 0
    for values in tensors.values():
        tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
        total += float(tensor.sum())
        size += tensor.numel() * tensor.element_size()
    return total, size


def measure(folder: Path, rounds: int) -> dict[str, object]:
    """Seconds (medians), their ratio, and peak memory over the tensors' size, per format."""
    results: dict[str, object] = {}
    for file in FILES:
        path = folder / file
        apart: dict[str, list[dict[str, float]]] = {"leanclip": [], "framework": []}
        for reader in apart:  # the page cache's warm-up
            in_own_process(__file__, reader, path)
        for _ in range(rounds):
            for reader in apart:
                apart[reader].append(in_own_process(__file__, reader, path))
        sums = [run["sum"] for runs in apart.values() for run in runs]
        if not all(math.isclose(value, sums[0], rel_tol=1e-4) for value in sums):
            raise NotTheSame(f"{file}: the sums of all values are {sums}")
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


if __name__ == "__main__":
    main()
