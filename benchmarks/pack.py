"""How fast data is packed and checked, and what a JPEG decoder's own reduction changes.

    python benchmarks/pack.py --out benchmarks/pack.json

300 photographs of 2000 x 1500 at quality 90, parts of scikit-image's, enlarged. Images a second by
all CPU cores: `pack` to a short side of 256, with images decoded small (leanclip) and decoded whole
(as Pillow's resize alone), in turn; `check`; processes' start included. Then
the loader's speed in one process, from the photographs and from what they were packed to.
Then grey levels, mean over all pixels, of the photographs as they are (not enlarged, so sharper) at
a short side of 64: what decoding small changes before JPEG at quality 90 encodes the result, and
what that encoding changes itself.
"""

import io
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image
from skimage import data as photographs

from leanclip.config.data import DataConfig
from leanclip.data import open_dataset, parse_source
from leanclip.data import scaled_decode as reduced
from leanclip.data.batch import Batch
from leanclip.data.loader import training_batches
from leanclip.data.tools.check import open_parts, read_parts
from leanclip.data.tools.findings import find
from leanclip.data.tools.pack import pack
from leanclip.preprocess.decoding import open_image
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.text import Tokenizer
from measuring import chosen, finish, in_turn, options, spread

COUNT, SIZE, SIDE = 300, (2000, 1500), 256
NAMES = ("astronaut", "chelsea", "coffee", "rocket", "retina", "hubble_deep_field")
WHOLE = 10**6  # a margin under which nothing is decoded small


def main(words: Sequence[str] | None = None) -> None:
    given = chosen(options(__doc__), words)
    count = 12 if given.tiny else COUNT
    with tempfile.TemporaryDirectory() as folder:
        root, packed = Path(folder) / "data", Path(folder) / "packed"
        write_photographs(root, count)
        source = parse_source(f"pairs:{root}")

        def run_pack(margin: int) -> None:
            before, reduced.MARGIN = reduced.MARGIN, margin
            pack(source, packed, side=SIDE, shard_size=25)
            reduced.MARGIN = before
            shutil.rmtree(packed)

        def check() -> None:
            parts = open_parts([source])
            read_parts(parts)
            find(parts, batch_size=1024, context_length=77)

        ways: dict[str, Callable[[], object]] = {
            "pack": lambda: run_pack(reduced.MARGIN),
            "pack, decoded whole": lambda: run_pack(WHOLE),
            "check": check,
        }
        seconds = in_turn(ways, given.rounds)
        result = {
            "images": count,
            "size": SIZE,
            "images_per_second": {
                name: spread([count / one for one in taken]) for name, taken in seconds.items()
            },
            "training_images_per_second": training_speed(root, packed, given.rounds),
            "grey_levels": grey_levels(),
        }
    finish(result, given)


def training_speed(root: Path, packed: Path, rounds: int) -> dict[str, Any]:
    """Images a second of processor time that the loader reads in one process, batches of 50."""
    source = parse_source(f"pairs:{root}", ["workers=0"])
    pack(source, packed, side=SIDE, shard_size=25)
    shards = parse_source(f"shards:{packed}", ["workers=0"])
    ways = {
        name: lambda settings=settings: read_batches(settings)
        for name, settings in (("from the photographs", source), ("from packed shards", shards))
    }
    seconds = in_turn(ways, rounds, clock=time.process_time)
    images = sum(map(len, next(iter(ways.values()))()))
    return {name: spread([images / one for one in taken]) for name, taken in seconds.items()}


def read_batches(settings: DataConfig) -> list[Batch]:
    dataset = open_dataset(settings)
    size = min(50, len(dataset))
    stream = training_batches(
        dataset,
        settings,
        preprocess=Preprocess(224),
        tokenizer=Tokenizer(77),
        truncate=True,
        batch_size=size,
        seed=0,
    )
    return [next(stream)[0] for _ in range(5)]


def write_photographs(root: Path, count: int) -> None:
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
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
        part = reduced.open_scaled(header, 64, max_pixels=10**9)
        resized = part.resize(whole.size, Image.Resampling.BICUBIC)
        again = simplejpeg.encode_jpeg(np.asarray(whole), 90, "RGB", colorsubsampling="420")
        small.append(difference(whole, resized))
        encoded.append(difference(whole, Image.open(io.BytesIO(again))))
    return {"decoded small": float(np.mean(small)), "encoded": float(np.mean(encoded))}


def difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, int) - np.asarray(b, int)).mean())


if __name__ == "__main__":
    main()
