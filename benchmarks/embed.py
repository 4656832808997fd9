"""`leanclip embed` over 20,000 images: its memory, a kill; its rate beside the model's alone.

python benchmarks/embed.py [--images 20000] > benchmarks/embed.json

The images are drawn JPEGs of 64 x 64 pixels, the models ViTs of 4 layers with random weights.
As processes of their own, with a small model: one run from start to end, whose memory is looked at
all along; one that is killed half-way (SIGKILL), and started again.
In one process, with a model wide enough for decoding not to be the limit: `embed` over 400 images
and `Clip.embed_pixels` on one batch again and again, in turn, nine rounds; the median of the
rounds' ratios.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

import leanclip
from leanclip.embeddings import Source, embed, read_embeddings
from leanclip.images import Preprocess
from leanclip.model import CLIP
from leanclip.weights import save_weights

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
BATCH, SHARD, ROUNDS, PART = 64, 1000, 9, 400


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=20_000)
    count = parser.parse_args().images
    with TemporaryDirectory() as name:
        folder = Path(name)
        draw(folder / "images", count)
        for name, arch in (("model", ARCH), ("wide", WIDE)):
            torch.manual_seed(0)
            model = CLIP(**arch)
            (folder / name).mkdir()
            preprocess = Preprocess(model.config.image_resolution)
            state = model.state_dict()
            save_weights(folder / name, state, model.config, preprocess, provenance="a benchmark")
        report: dict = {"threads": torch.get_num_threads(), "cores": len(os.sched_getaffinity(0))}
        report["rates"] = rates(folder)
        report["one run"] = watched(folder, "whole", count)
        report["killed and continued"] = killed(folder, count)
        whole, again = (read_embeddings(folder / out) for out in ("whole", "killed"))
        report["killed and continued"]["ids are the same"] = whole[0] == again[0]
        report["killed and continued"]["greatest difference"] = float(
            np.abs(whole[1] - again[1]).max()
        )
    print(json.dumps(report, indent=1))


def draw(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number // 1000:03d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((64, 64), Image.Resampling.BICUBIC).save(path, quality=90)


def rates(folder: Path) -> dict:
    """Images a second of the model alone, and of `embed`."""
    clip = leanclip.load(folder / "wide", device="cpu")
    source = Source.of(folder / "images/000")
    source = Source(source.folder, source.names[:PART])
    side = clip.preprocess.resolution
    pixels = torch.randint(0, 256, (BATCH, 3, side, side), dtype=torch.uint8)
    clip.embed_pixels(pixels)
    alone, whole = [], []
    for number in range(ROUNDS):
        start = time.perf_counter()
        for first in range(0, PART, BATCH):
            clip.embed_pixels(pixels[: PART - first])
        alone.append(PART / (time.perf_counter() - start))
        start = time.perf_counter()
        embed(clip, source, folder / f"rate-{number}", shard_size=SHARD, batch_size=BATCH)
        whole.append(PART / (time.perf_counter() - start))
    ratios = [b / a for a, b in zip(alone, whole, strict=True)]
    return {
        "model alone, images/s": [round(rate, 1) for rate in alone],
        "embed, images/s": [round(rate, 1) for rate in whole],
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def started(folder: Path, out: str) -> subprocess.Popen:
    words = ["embed", str(folder / "images"), "--model", str(folder / "model"), "--num-gpus", "0"]
    words += ["--out", str(folder / out), "--shard-size", str(SHARD), "--batch-size", str(BATCH)]
    code = "from leanclip.cli import main; main()"
    return subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL)


def shards(folder: Path, out: str) -> list[Path]:
    return sorted((folder / out).glob("*.npy"))


def watched(folder: Path, out: str, count: int) -> dict:
    """Resident memory when each tenth of the shards is there."""
    process, start = started(folder, out), time.perf_counter()
    total, seen = -(-count // SHARD), {}
    while process.poll() is None:
        done = len(shards(folder, out))
        if done:
            seen.setdefault(done, resident(process.pid))
        time.sleep(0.05)
    assert process.returncode == 0
    megabytes = {f"{done * SHARD} images": mb for done, mb in seen.items() if mb}
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "shards": total,
        "resident MB": megabytes,
    }


def resident(pid: int) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    found = [line for line in lines if line.startswith("VmRSS")]
    return int(found[0].split()[1]) // 1024 if found else None


def killed(folder: Path, count: int) -> dict:
    """Killed when half of the shards are there; how many were made again."""
    total = -(-count // SHARD)
    process = started(folder, "killed")
    while len(shards(folder, "killed")) < total // 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in shards(folder, "killed")}
    process, start = started(folder, "killed"), time.perf_counter()
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
