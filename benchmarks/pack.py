"""How fast data is packed and checked, and what a JPEG decoder's own reduction changes.

    python benchmarks/pack.py > benchmarks/pack.json

300 photographs of 2000 x 1500 at quality 90, parts of scikit-image's, enlarged. Images a second by
all CPU cores: `pack` to a short side of 256, with images decoded small (leanclip) and decoded whole
(as Pillow's resize alone), in turn; `check`; best of three rounds, processes' start included. Then
the loader's speed in one process, from the photographs and from what they were packed to.
Then grey levels, mean over all pixels, of the photographs as they are (not enlarged, so sharper) at
a short side of 64: what decoding small changes before JPEG at quality 90 encodes the result, and
what that encoding changes itself.
"""

import io
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image
from skimage import data as photographs

from leanclip.data import open_dataset, parse_source, reduced
from leanclip.data.loader import training_batches
from leanclip.data.pack import pack
from leanclip.data.preflight.check import open_parts, read_parts
from leanclip.data.preflight.findings import find
from leanclip.images import open_image

COUNT, SIZE, SIDE = 300, (2000, 1500), 256
NAMES = ("astronaut", "chelsea", "coffee", "rocket", "retina", "hubble_deep_field")
WHOLE = 10**6  # a margin under which nothing is decoded small


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        write_photographs(root)
        source = parse_source(f"pairs:{root}")
        margin = reduced.MARGIN
        seconds: dict[str, list[float]] = {"pack": [], "pack, decoded whole": [], "check": []}
        for _ in range(3):
            for name, value in (("pack", margin), ("pack, decoded whole", WHOLE)):
                reduced.MARGIN = value
                started = time.perf_counter()
                pack(source, Path(folder) / "packed", side=SIDE, shard_size=25)
                seconds[name].append(time.perf_counter() - started)
                shutil.rmtree(Path(folder) / "packed")
            reduced.MARGIN = margin
            started = time.perf_counter()
            parts = open_parts([source])
            read_parts(parts)
            find(parts, batch_size=1024, context_length=77)
            seconds["check"].append(time.perf_counter() - started)
        training = training_speed(root, Path(folder) / "packed")
        result = {
            "cores": len(os.sched_getaffinity(0)),
            "commit": commit(),
            "images": COUNT,
            "size": SIZE,
            "images_per_second": {name: COUNT / min(times) for name, times in seconds.items()},
            "training_images_per_second": training,
            "grey_levels": grey_levels(),
        }
    print(json.dumps(result, indent=2))


def training_speed(root: Path, packed: Path) -> dict[str, float]:
    """Images a second of processor time that the loader reads in one process, batches of 50."""
    source = parse_source(f"pairs:{root}", ["workers=0"])
    pack(source, packed, side=SIDE, shard_size=25)
    shards = parse_source(f"shards:{packed}", ["workers=0"])
    seconds: dict[str, list[float]] = {"from the photographs": [], "from packed shards": []}
    for _ in range(3):
        for name, settings in zip(seconds, (source, shards), strict=True):
            stream = training_batches(
                open_dataset(settings),
                settings,
                resolution=224,
                context_length=77,
                truncate=True,
                batch_size=50,
                seed=0,
            )
            next(stream)
            started = time.process_time()
            for _ in range(5):
                next(stream)
            seconds[name].append(time.process_time() - started)
    return {name: 250 / min(times) for name, times in seconds.items()}


def write_photographs(root: Path) -> None:
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        image = Image.fromarray(getattr(photographs, NAMES[i % len(NAMES)])())
        width = int(image.width * rng.uniform(0.6, 1))
        height = min(image.height, width * 3 // 4)
        left = int(rng.integers(image.width - width + 1))
        top = int(rng.integers(image.height - height + 1))
        box = (left, top, left + width, top + height)
        image.resize(SIZE, Image.Resampling.BICUBIC, box=box).save(root / f"{i}.jpg", quality=90)
        (root / f"{i}.txt").write_text(f"photograph {i}\n")


def grey_levels() -> dict[str, float]:
    small, encoded = [], []
    for name in NAMES:
        file = io.BytesIO()
        Image.fromarray(getattr(photographs, name)()).save(file, "JPEG", quality=90)
        whole = open_image(file.getvalue())
        size = tuple(round(64 * side / min(whole.size)) for side in whole.size)
        whole = whole.resize((size[0], size[1]), Image.Resampling.BICUBIC)
        header = reduced.open_header(file.getvalue(), max_pixels=10**9)
        part = reduced.open_reduced(header, 64, max_pixels=10**9)
        resized = part.resize(whole.size, Image.Resampling.BICUBIC)
        again = simplejpeg.encode_jpeg(np.asarray(whole), 90, "RGB", colorsubsampling="420")
        small.append(difference(whole, resized))
        encoded.append(difference(whole, Image.open(io.BytesIO(again))))
    return {"decoded small": float(np.mean(small)), "encoded": float(np.mean(encoded))}


def difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, int) - np.asarray(b, int)).mean())


def commit() -> str:
    words = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
