"""The input pipeline from files to the step: with workers, and the time that training waits for it.

    python benchmarks/pipeline.py --out benchmarks/pipeline.json

Photographs of 512 x 384 pixels (made as images.py makes them) with a caption each, in the page
cache. The loader alone: images a second, wall-clock, from files to batches of 32 at 224 pixels, by
the number of workers, in turn; the batches must be the same, whatever that number. Then the real
`leanclip train` on the same files: its images a second and the share of its time that it waited for
data (`train/data_wait_fraction` of metrics.jsonl, without the first line), with the quickstart's
small model at 50 pixels, which waits most, and with ViT-B/32. On a CPU the towers and the workers
share the cores. Per-core figures of each stage are those of images.py.
"""

import argparse
import json
import statistics
import subprocess
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from images import make_photographs
from leanclip.config.data import DataConfig
from leanclip.config.strict_yaml import dump_yaml
from leanclip.data import open_dataset
from leanclip.data.batch import Batch
from leanclip.data.loader import training_batches
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.text import Tokenizer
from measuring import NotTheSame, chosen, command_line, finish, in_turn, options, spread
from models import QUICKSTART, architecture, realistic_captions

BATCH = 32


def write_data(root: Path, count: int) -> None:
    paths = make_photographs(root, (512, 384), count, 0)
    for path, caption in zip(paths, realistic_captions(count), strict=True):
        path.with_suffix(".txt").write_text(caption + "\n")


def batches(root: Path, workers: int, count: int) -> list[Batch]:
    config = DataConfig(format="pairs", root=str(root), workers=workers)
    stream = training_batches(
        open_dataset(config),
        config,
        preprocess=Preprocess(224),
        tokenizer=Tokenizer(77),
        truncate=True,
        batch_size=BATCH,
        seed=0,
    )
    return [batch for batch, _ in islice(stream, count)]


def loader(root: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Images a second from open_dataset on, the start of the workers included."""
    first = batches(root, 0, 2)
    for workers in given.workers:
        for a, b in zip(first, batches(root, workers, 2), strict=True):
            if not (torch.equal(a.images, b.images) and torch.equal(a.tokens, b.tokens)):
                raise NotTheSame(f"batches with {workers} workers")
    ways = {
        f"{workers} workers": lambda workers=workers: batches(root, workers, given.batches)
        for workers in given.workers
    }
    seconds = in_turn(ways, given.rounds)
    images = given.batches * BATCH
    return {way: spread([images / taken for taken in each]) for way, each in seconds.items()}


def training(name: str, root: Path, folder: Path, steps: int, given: argparse.Namespace) -> Any:
    """What metrics.jsonl of real runs says, by the number of workers."""
    arch = architecture(name)
    size = len(list(root.glob("*.jpg"))) // BATCH * BATCH
    results = {}
    for workers in given.workers:
        config = {
            "model": arch,
            "data": {"format": "pairs", "root": str(root), "workers": workers},
            "train": {
                "epochs": -(-steps * BATCH // size),
                "batch_size": BATCH,
                "log_every": max(1, steps // 6),
            },
            "optimizer": {"learning_rate": 1e-4},
        }
        where = folder / f"{name}-{workers}"
        path = where.with_suffix(".yaml")
        path.write_text(dump_yaml(config))
        words = ("train", "-c", str(path), "--output-dir", str(where), "--num-gpus", "0")
        done = subprocess.run(command_line(*words), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        text = (where / "metrics.jsonl").read_text()
        lines = [line for line in map(json.loads, text.splitlines()) if "train/loss" in line]
        rates = [line["train/samples_per_second"] for line in lines[1:]]
        results[f"{workers} workers"] = {
            "images_per_second": spread(rates),
            "share_waiting": round(
                statistics.mean(x["train/data_wait_fraction"] for x in lines[1:]), 3
            ),
        }
    return results


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=12, help="of the loader alone, a round")
    parser.add_argument("--models", nargs="*", default=[QUICKSTART, "ViT-B-32"])
    parser.add_argument("--images", type=int, default=384)
    given = chosen(parser, words)
    if given.tiny:
        given.workers, given.batches, given.models, given.images = [0, 1], 2, ["tiny"], 64
        given.rounds = 1
    results: dict[str, Any] = {}
    with TemporaryDirectory() as name:
        root, folder = Path(name) / "data", Path(name)
        write_data(root, given.images)
        results["loader alone"] = loader(root, given)
        results["training"] = {
            model: training(model, root, folder, 12 if "ViT" in model else 120, given)
            for model in given.models
        }
    finish(results, given)


if __name__ == "__main__":
    main()
