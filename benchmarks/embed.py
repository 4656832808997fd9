"""`leanclip embed` over 20,000 images: its memory, a kill; its rate beside the model's alone.

    python benchmarks/embed.py --out benchmarks/embed.json

The images are drawn JPEGs of 64 x 64 pixels, the models ViTs of 4 layers with random weights.
As processes of their own, with a small model: one run from start to end, whose memory is looked at
all along; one that is killed half-way (SIGKILL), and started again.
In one process, with a model wide enough for decoding not to be the limit: `embed` over 400 images
and `InferenceModel.embed_pixels` on one batch again and again, in turn, nine rounds; the median
of the rounds' ratios.
"""

import contextlib
import itertools
import signal
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

import leanclip
from leanclip.inference.embeddings import Source, embed, read_embeddings
from leanclip.model import CLIP
from leanclip.preprocess.images import Preprocess
from leanclip.weights import save_weights
from measuring import chosen, command_line, finish, in_turn, options, resident_bytes

ARCH = {
    "embed_dim": 128,
    "image_resolution": 64,
    "vision_layers": 4,
    "vision_width": 128,
    "vision_patch_size": 8,
    "vision_heads": 2,
    "transformer_width": 64,
    "transformer_heads": 1,
    "transformer_layers": 1,
}
WIDE = ARCH | {"vision_width": 256, "vision_heads": 4}
BATCH, SHARD, PART = 64, 1000, 400


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__, rounds=9, threads=1)
    parser.add_argument("--images", type=int, default=20_000)
    given = chosen(parser, words)
    shard, part, count = SHARD, PART, given.images
    if given.tiny:
        shard, part, count, given.rounds = 20, 20, 80, 2
    with TemporaryDirectory() as name:
        folder = Path(name)
        draw(folder / "images", count, shard)
        for name, arch in (("model", ARCH), ("wide", WIDE)):
            torch.manual_seed(0)
            model = CLIP(**arch)
            (folder / name).mkdir()
            preprocess = Preprocess(model.config.image_resolution)
            state = model.state_dict()
            save_weights(folder / name, state, model.config, preprocess, provenance="a benchmark")
        report: dict = {"rates": rates(folder, part, given.rounds)}
        report["one run"] = watched(folder, "whole", count, shard)
        report["killed and continued"] = killed(folder, count, shard)
        whole, again = (read_embeddings(folder / out) for out in ("whole", "killed"))
        report["killed and continued"]["ids are the same"] = whole[0] == again[0]
        report["killed and continued"]["greatest difference"] = float(
            np.abs(whole[1] - again[1]).max()
        )
    finish(report, given)


def draw(folder: Path, count: int, shard: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number // shard:03d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((64, 64), Image.Resampling.BICUBIC).save(path, quality=90)


def rates(folder: Path, part: int, rounds: int) -> dict:
    """Images a second of the model alone, and of `embed`."""
    clip = leanclip.load(folder / "wide", device="cpu")
    source = Source.of(folder / "images/000")
    source = Source(source.folder, source.names[:part])
    side = clip.preprocess.resolution
    pixels = torch.randint(0, 256, (BATCH, 3, side, side), dtype=torch.uint8)
    numbers = itertools.count()

    def alone() -> None:
        for first in range(0, part, BATCH):
            clip.embed_pixels(pixels[: part - first])

    def whole() -> None:
        out = folder / f"rate-{next(numbers)}"
        embed(clip, source, out, shard_size=SHARD, batch_size=BATCH)

    seconds = in_turn({"alone": alone, "embed": whole}, rounds)
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    return {
        "model alone, images/s": [round(part / taken, 1) for taken in seconds["alone"]],
        "embed, images/s": [round(part / taken, 1) for taken in seconds["embed"]],
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def started(folder: Path, out: str, shard: int) -> subprocess.Popen:
    words = ["embed", str(folder / "images"), "--model", str(folder / "model"), "--num-gpus", "0"]
    words += ["--out", str(folder / out), "--shard-size", str(shard), "--batch-size", str(BATCH)]
    return subprocess.Popen(command_line(*words), stdout=subprocess.DEVNULL)


def shards(folder: Path, out: str) -> list[Path]:
    return sorted((folder / out).glob("*.npy"))


def watched(folder: Path, out: str, count: int, shard: int) -> dict:
    """Resident memory when each tenth of the shards is there."""
    process, start = started(folder, out, shard), time.perf_counter()
    total, seen = -(-count // shard), {}
    while process.poll() is None:
        done = len(shards(folder, out))
        if done:
            with contextlib.suppress(OSError, IndexError):  # it may end just now
                seen.setdefault(done, resident_bytes(process.pid) // 2**20)
        time.sleep(0.05)
    assert process.returncode == 0
    megabytes = {f"{done * shard} images": mb for done, mb in seen.items()}
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "shards": total,
        "resident MB": megabytes,
    }


def killed(folder: Path, count: int, shard: int) -> dict:
    """Killed when half of the shards are there; how many were made again."""
    total = -(-count // shard)
    process = started(folder, "killed", shard)
    while len(shards(folder, "killed")) < total // 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in shards(folder, "killed")}
    process, start = started(folder, "killed", shard), time.perf_counter()
    assert process.wait() == 0
    kept = sum(path.stat().st_mtime_ns == at for path, at in before.items())
    return {
        "shards when killed": len(before),
        "kept as they were": kept,
        "shards in the end": len(shards(folder, "killed")),
        "seconds of the second start": round(time.perf_counter() - start, 1),
    }


if __name__ == "__main__":
    main()
