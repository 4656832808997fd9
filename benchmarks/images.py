"""Images per second of leanclip's image path, against open_clip's transform on Pillow.

    python benchmarks/images.py --out benchmarks/images.json

Photographs are made from scikit-image's pictures by seeded augmentation (part, mirror image,
brightness, contrast; in one set grain too), saved as JPEG of quality 90 and 4:2:0. Those of
2000x1500 are enlarged pictures, smoother than a camera's; the set with grain is nearer to one.

Each pipeline reads files (page cache) and makes batches of 50: Pillow's as open_clip trains (open,
RGB, random resized crop of 0.9 to 1.0 bicubic, float tensor, normalise) and evaluates (short side
to 224, middle), ours to uint8, whose normalisation is the device's; its cost here is stated apart.
The pipelines take turns, one process, one thread; medians of the rounds, and of their ratios.
Time is that of the processor, so that other processes' turns do not count.

Evaluation equals Pillow's pipeline in every value, which costs the speed. At 512 pixels nothing is
decoded smaller, as a crop keeps 1.5 times the wanted side: the two columns are one computation.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance
from skimage import data as pictures

from leanclip.preprocess.crops import decoding_factor, draw_box, resized, training_pixels
from leanclip.preprocess.decoding import open_image, open_part
from leanclip.preprocess.images import (
    CLIP_MEAN,
    CLIP_STD,
    Preprocess,
    center_crop,
    evaluation_pixels,
    normalize,
    to_array,
)
from measuring import chosen, finish, options

PICTURES = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina")
SETS = {  # name: (size, how many, standard deviation of the grain in grey levels)
    "512x384": ((512, 384), 200, 0),
    "512x512": ((512, 512), 200, 0),
    "2000x1500": ((2000, 1500), 40, 0),
    "2000x1500 with grain": ((2000, 1500), 40, 4),
}
BATCH, RESOLUTION = 50, 224
CROP: dict[str, Any] = {
    "scale": (0.9, 1.0),
    "ratio": (3 / 4, 4 / 3),
}  # open_clip's defaults, and ours
BICUBIC = Image.Resampling.BICUBIC


def main(words: Sequence[str] | None = None) -> None:
    given = chosen(options(__doc__, threads=1), words)
    sets: dict[str, Any] = {}
    wanted = {"512x384": (*SETS["512x384"][:1], 4, 0)} if given.tiny else SETS
    with tempfile.TemporaryDirectory() as folder:
        for name, (size, count, grain) in wanted.items():
            paths = make_photographs(Path(folder) / name, size, count, grain)
            sets[name] = measure(paths, given.rounds) | {
                "bytes per pixel": round(
                    statistics.mean(p.stat().st_size for p in paths) / (size[0] * size[1]), 3
                ),
                "differences in grey levels": differences(paths[:40]),
            }
    finish({"sets": sets}, given)


def make_photographs(folder: Path, size: tuple[int, int], count: int, grain: float) -> list[Path]:
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        image = Image.fromarray(getattr(pictures, PICTURES[number % len(PICTURES)])())
        box = draw_box(*image.size, rng, scale=(0.4, 1.0), ratio=(1.0, 1.5))
        image = image.resize(size, BICUBIC, box=box)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.8, 1.2))
        image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.8, 1.2))
        if grain:
            values = np.asarray(image) + rng.normal(0, grain, (size[1], size[0], 3))
            image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
        paths.append(folder / f"{number:03d}.jpg")
        image.save(paths[-1], quality=90)
    return paths


class Clock:
    """Processor seconds by stage; a stage is what was done since the last call."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self.last = time.process_time()

    def __call__(self, stage: str) -> None:
        now = time.process_time()
        self.stages[stage] = self.stages.get(stage, 0.0) + now - self.last
        self.last = now


def pillow_training(paths: list[Path], clock: Clock) -> torch.Tensor:
    rng, images = np.random.default_rng(0), []
    for path in paths:
        image = Image.open(path).convert("RGB")
        clock("read and decode")
        box = draw_box(*image.size, rng, **CROP)
        image = image.crop(box).resize((RESOLUTION, RESOLUTION), BICUBIC)
        clock("resize")
        images.append(to_float(image))
        clock("float and normalise")
    return collated(torch.stack, images, clock)


def pillow_evaluation(paths: list[Path], clock: Clock) -> torch.Tensor:
    images = []
    for path in paths:
        image = Image.open(path).convert("RGB")
        clock("read and decode")
        image = center_crop(image, RESOLUTION)
        clock("resize")
        images.append(to_float(image))
        clock("float and normalise")
    return collated(torch.stack, images, clock)


def to_float(image: Image.Image) -> torch.Tensor:
    """As torchvision's ToTensor and Normalize."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
    mean, std = (torch.tensor(value)[:, None, None] for value in (CLIP_MEAN, CLIP_STD))
    return pixels.sub_(mean).div_(std)


def our_training(scaled_decoding: bool) -> Callable[[list[Path], Clock], torch.Tensor]:
    """`training_pixels` with the clock between its two steps."""

    def run(paths: list[Path], clock: Clock) -> torch.Tensor:
        rng, images = np.random.default_rng(0), []

        def choose(width: int, height: int) -> tuple[tuple[int, int, int, int], int]:
            box = draw_box(width, height, rng, **CROP)
            return box, decoding_factor(box, RESOLUTION) if scaled_decoding else 1

        for path in paths:
            data = path.read_bytes()
            clock("read")
            part = open_part(data, choose)
            clock("decode and crop")
            images.append(resized(part, (RESOLUTION, RESOLUTION)))
            clock("resize")
        return collated(stack, images, clock)

    return run


def our_evaluation(paths: list[Path], clock: Clock) -> torch.Tensor:
    images = []
    for path in paths:
        data = path.read_bytes()
        clock("read")
        image = open_image(data)
        clock("decode and crop")
        images.append(to_array(center_crop(image, RESOLUTION)))
        clock("resize")
    return collated(stack, images, clock)


def stack(images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images))


def collated(how: Callable[[list], torch.Tensor], images: list, clock: Clock) -> torch.Tensor:
    batch = how(images)
    clock("collate")
    return batch


PIPELINES = {
    "training, Pillow": pillow_training,
    "training, full decoding": our_training(False),
    "training, scaled decoding": our_training(True),
    "evaluation, Pillow": pillow_evaluation,
    "evaluation": our_evaluation,
}


def measure(paths: list[Path], rounds: int) -> dict:
    batches = [paths[first : first + BATCH] for first in range(0, len(paths), BATCH)]
    milliseconds: dict[str, list[dict[str, float]]] = {name: [] for name in PIPELINES}
    normalising, pixels = [], torch.empty(0)
    for run in range(rounds + 1):  # the first warms up
        for name, pipeline in PIPELINES.items():
            clock = Clock()
            for batch in batches:
                pixels = pipeline(batch, clock)
            stages = {k: 1000 * v / len(paths) for k, v in clock.stages.items()}
            if run:
                milliseconds[name].append(stages)
        start = time.process_time()
        normalize(pixels, CLIP_MEAN, CLIP_STD)
        normalising.append(1000 * (time.process_time() - start) / len(pixels))
    totals = {
        name: [sum(stages.values()) for stages in runs] for name, runs in milliseconds.items()
    }
    result = {}
    for name, runs in milliseconds.items():
        base = totals[f"{name.split(',')[0]}, Pillow"]
        result[name] = {
            "images per processor second": round(1000 / statistics.median(totals[name]), 1),
            "ratio": round(
                statistics.median(b / t for b, t in zip(base, totals[name], strict=True)), 2
            ),
            "milliseconds": {
                stage: round(statistics.median(run[stage] for run in runs), 3) for stage in runs[0]
            },
        }
    result["normalising on this CPU, milliseconds"] = round(statistics.median(normalising), 3)
    return result


def differences(paths: list[Path]) -> dict:
    """What our pixels differ by from Pillow's, and the scaled decode's from the full one's."""
    evaluation, full, scaled = [], [], []
    for number, path in enumerate(paths):
        image = Image.open(path).convert("RGB")
        expected = to_array(center_crop(image, RESOLUTION)).astype(int)
        evaluation.append(np.abs(evaluation_pixels(path, Preprocess(RESOLUTION)) - expected).max())
        box = draw_box(*image.size, np.random.default_rng(number), **CROP)
        expected = to_array(image.crop(box).resize((RESOLUTION, RESOLUTION), BICUBIC)).astype(int)
        ours, small = (
            training_pixels(
                path,
                Preprocess(RESOLUTION),
                np.random.default_rng(number),
                scaled_decoding=on,
                **CROP,
            )
            for on in (False, True)
        )
        full.append(np.abs(ours - expected).max())
        scaled.append(np.abs(small - expected).mean())
    return {
        "evaluation, greatest": int(max(evaluation)),
        "training with full decoding, greatest": int(max(full)),
        "training with scaled decoding, mean": round(float(np.mean(scaled)), 2),
    }


if __name__ == "__main__":
    main()
