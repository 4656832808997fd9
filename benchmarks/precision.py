"""The quickstart in bf16 and in float32: do the loss curves stay together?

    leanclip data shapes data/shapes
    OMP_NUM_THREADS=1 python benchmarks/precision.py --runs RUNS > benchmarks/precision.json

Three runs of the real command line with configs/quickstart.yaml, its loss in metrics.jsonl at every
step: in float32, in bf16, and, as a measure of chance, in float32 with another seed. Run and seed
apart, all is the same: initial weights, order of the data, crops. The curves are compared as means
over tenths of the run. The band is that of `tests/training/test_precision.py`: in every tenth the
two means are within BAND of float32's.

`--only NAME` makes one of the runs and ends there; those that a folder holds are not made again, so
that the three can be made in pieces.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from leanclip.io.files import read_metrics
from measuring import command_line

BAND = 0.05  # of the loss; in the first tenths, where it is large, 2% of it
PARTS = 10
RUNS = {
    "fp32": ["train.precision=fp32"],
    "bf16": ["train.precision=bf16"],
    "fp32, another seed": ["train.precision=fp32", "seed=1"],
}


def tenths(losses: list[float], parts: int = PARTS) -> list[float]:
    """The mean loss of each part of a run."""
    cuts = [len(losses) * i // parts for i in range(parts + 1)]
    return [statistics.fmean(losses[a:b]) for a, b in itertools.pairwise(cuts)]


def apart(first: list[float], second: list[float]) -> list[float]:
    """By how much each part of two curves differs."""
    return [b - a for a, b in zip(tenths(first), tenths(second), strict=True)]


def run(name: str, folder: Path) -> Path:
    """The folder of a run, which is made unless it is there."""
    place = folder / name.replace(", ", "-").replace(" ", "-")
    if (place / "report.json").is_file():
        return place
    words = [
        *RUNS[name],
        "train.log_every=1",
        "evaluate.every_epochs=null",
        "evaluate.pictures=false",
    ]
    options = [word for one in words for word in ("-o", one)]
    command = ["train", "-c", "configs/quickstart.yaml", "--output-dir", str(place), *options]
    subprocess.run(command_line(*command), check=True, stdout=sys.stderr)
    return place


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--only", choices=RUNS)
    settings = parser.parse_args()
    if settings.only:
        run(settings.only, settings.runs)
        return
    found = {name: run(name, settings.runs) for name in RUNS}
    losses = {
        name: [line["train/loss"] for line in read_metrics(place) if "train/loss" in line]
        for name, place in found.items()
    }
    metrics = {
        name: json.loads((place / "report.json").read_text())["metrics"]
        for name, place in found.items()
    }
    differences = {name: apart(losses["fp32"], losses[name]) for name in found if name != "fp32"}
    facts = {
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "steps": len(losses["fp32"]),
        "loss by tenths": {name: rounded(tenths(values)) for name, values in losses.items()},
        "from fp32": {name: rounded(values) for name, values in differences.items()},
        "greatest": {name: round(max(map(abs, v)), 4) for name, v in differences.items()},
        "greatest at one step": {
            name: round(
                max(abs(a - b) for a, b in zip(losses["fp32"], losses[name], strict=True)), 4
            )
            for name in differences
        },
        "band": BAND,
        "is within the band": max(map(abs, differences["bf16"])) <= BAND,
        "zero-shot top-1": {name: one["zeroshot_top1"] for name, one in metrics.items()},
        "image to text recall@1": {name: one["image_to_text_R@1"] for name, one in metrics.items()},
    }
    print(json.dumps(facts, indent=1))


def rounded(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]


if __name__ == "__main__":
    main()
