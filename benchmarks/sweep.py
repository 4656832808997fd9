"""A sweep over eleven alphas: what decoding each image once is worth.

    python benchmarks/sweep.py --out benchmarks/sweep.json

200 JPEGs of 640 x 480, of smoothed noise, in two classes, and a small image tower of the
quickstart's widths, at 224 pixels: on a GPU a large tower is as cheap beside the decoding. `once`
is evaluate_each, which gives every batch to each mixture in turn; `again` is evaluate for one
mixture after the other. Their figures must agree before anything is timed. Processor time counts,
of one thread, no workers; the two take turns.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from leanclip import CLIP, Preprocess
from leanclip.config.schema import Config
from leanclip.config.sections import parse, to_plain
from leanclip.evaluation import Task, evaluate, open_tasks
from leanclip.evaluation.multi_model import evaluate_each
from leanclip.evaluation.sweep import Mixtures
from leanclip.weights import Weights
from measuring import NotTheSame, chosen, finish, in_turn, options, ratios

ALPHAS = [i / 10 for i in range(11)]
IMAGES = 200
ARCH = {
    "embed_dim": 128, "image_resolution": 224, "vision_layers": 5, "vision_width": 128,
    "vision_heads": 4, "vision_patch_size": 32, "context_length": 77, "vocab_size": 49408,
    "transformer_width": 64, "transformer_heads": 2, "transformer_layers": 2,
}  # fmt: skip


def draw(root: Path, count: int) -> None:
    """Images by class."""
    rng = np.random.default_rng(0)
    for i in range(count):
        folder = root / ("ant", "bee")[i % 2]
        folder.mkdir(exist_ok=True, parents=True)
        noise = Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8))
        noise.filter(ImageFilter.GaussianBlur(2)).save(folder / f"{i}.jpg", quality=90)


def weights(seed: int) -> Weights:
    """A new model's."""
    torch.manual_seed(seed)
    model = CLIP(**ARCH)
    return Weights(Path(f"{seed}"), "leanclip", model.state_dict(), model.config, Preprocess(224))


def once(mixtures: Mixtures, tasks: list[Task]) -> list[dict[str, float]]:
    """Every batch to all mixtures."""
    return [report.metrics for report in evaluate_each(mixtures, tasks)]


def again(mixtures: Mixtures, tasks: list[Task]) -> list[dict[str, float]]:
    """One mixture after the other."""
    return [evaluate(model, tasks, preprocess).metrics for model, preprocess in mixtures]


def main(words: Sequence[str] | None = None) -> None:
    """The times of both, and their ratio."""
    given = chosen(options(__doc__, threads=1), words)
    count, alphas = (8, ALPHAS[:2]) if given.tiny else (IMAGES, ALPHAS)
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), count)
        values = {"model": ARCH, "data": {"format": "folder", "root": folder, "workers": 0},
                  "evaluate": {"zero_shot": {}}}  # fmt: skip
        config = parse(Config, values, where="benchmark")
        tasks = open_tasks(config)
        mixtures = Mixtures(weights(1), weights(2), alphas, torch.device("cpu"))
        if once(mixtures, tasks) != again(mixtures, tasks):
            raise NotTheSame("figures of the two ways")
        ways = {"once": lambda: once(mixtures, tasks), "again": lambda: again(mixtures, tasks)}
        times = in_turn(ways, given.rounds, clock=time.process_time, warm=0)
    results = {
        "parameters": sum(p.numel() for p in CLIP(**to_plain(config.model)).parameters()),
        "images": count,
        "alphas": len(alphas),
        "seconds": {name: [round(one, 2) for one in taken] for name, taken in times.items()},
        "ratio": ratios(times, "once")["again"]["median"],
    }
    finish(results, given)


if __name__ == "__main__":
    main()
