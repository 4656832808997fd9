"""Images and prompts to features, beside transformers: batches of 1 to 256, 101 and 8,080 prompts.

    python benchmarks/encode.py --out benchmarks/encode.json
    python benchmarks/encode.py --model siglip-B-16 --parts pixels --batches 1 8

ViT-B/32 with the same random weights in leanclip and in transformers' `CLIPModel`, in one process,
in turn. `pixels` are normalised pixels through `InferenceModel.encode_image`, which gives a CPU as
many at a time as malloc keeps memory for, and `get_image_features`; the share of the measured
product rate is given. `file` is one JPEG of 640 x 427 pixels from the disk to a unit feature.
Prompts go from words to unit features with `embed_texts`: 101 are Food-101's names in the
template of transformers' zero-shot pipeline, 8,080 are those names in 80
made-up templates of the length that ImageNet's have. transformers tokenises as fast as it can and
pads to the longest of a batch, its best, or to
77. leanclip does not pad, and computes what prompts begin with once.

Of 8,080 prompts transformers encodes every sixteenth batch of 256, and its time is multiplied by
what was left out. Features must agree before anything is timed: within 1e-4 (norm over norm) for
pixels, prompts and the same file cut to a square; of the whole file transformers takes the square
from pixel 55 of 335, and OpenAI's transform, like ours, from 56.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

import leanclip
from leanclip.inference.model import InferenceModel
from measuring import (
    agree,
    chosen,
    compared,
    finish,
    in_turn,
    options,
    product_rate,
    ratios,
    significant,
    spread,
)
from models import FOODS, MANY_TEMPLATES, write_model

PARTS = ("pixels", "file", "101 prompts", "8,080 prompts")
BATCH, EVERY = 256, 16
BOUND = 1e-4
TEMPLATE = "This is a photo of {}."  # of transformers' zero-shot pipeline


class Theirs:
    """transformers' model with its tokeniser and image processor."""

    def __init__(self, folder: Path, device: str) -> None:
        self.model: Any = AutoModel.from_pretrained(folder).eval()
        self.model.to(device)
        self.processor: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        return unit(self.model.get_image_features(pixel_values=pixels))

    def file(self, path: str) -> torch.Tensor:
        image = Image.open(path).convert("RGB")
        pixels = self.processor(images=[image], return_tensors="pt")["pixel_values"]
        return self.pixels(pixels.to(self.model.device))

    @torch.inference_mode()
    def prompts(self, prompts: Sequence[str], padding: bool | str) -> torch.Tensor:
        parts = []
        for first in range(0, len(prompts), BATCH):
            few = list(prompts[first : first + BATCH])
            words = self.tokenizer(
                few, return_tensors="pt", padding=padding, max_length=77, truncation=True
            )
            parts.append(unit(self.model.get_text_features(**words.to(self.model.device))))
        return torch.cat(parts)


def unit(features: Any) -> torch.Tensor:
    features = getattr(features, "pooler_output", features)
    return F.normalize(features.float(), dim=-1)


def pixels_part(
    clip: InferenceModel, theirs: Theirs, sizes: Sequence[int], given: argparse.Namespace
) -> dict[str, Any]:
    """encode_image of batches that are on the device, in turn with a product of matrices."""
    side, results = clip.preprocess.resolution, {}
    product, of_product = product_rate(given.device, torch.float32, 64 if given.tiny else None)
    for size in sizes:
        pixels = torch.randn(size, 3, side, side, device=given.device)

        def ours(pixels: torch.Tensor = pixels) -> torch.Tensor:
            with torch.inference_mode():
                return unit(clip.encode_image(pixels))

        difference = agree(ours(), theirs.pixels(pixels), BOUND, f"{size} images")
        with FlopCounterMode(display=False) as counter:
            ours()
        ways: dict[str, Callable[[], object]] = {
            "leanclip": ours,
            "transformers": lambda pixels=pixels: theirs.pixels(pixels),
            "product": product,
        }
        rounds = given.rounds if size > 1 else 4 * given.rounds
        seconds = in_turn(ways, rounds, device=given.device, warm=1 if size < 64 else 0)
        rates = [of_product / taken for taken in seconds.pop("product")]
        flops = counter.get_total_flops()
        shares = [flops / t / r for t, r in zip(seconds["leanclip"], rates, strict=True)]
        results[f"{size} image{'s' if size > 1 else ''}"] = {
            "seconds": {way: spread(taken) for way, taken in seconds.items()},
            "ratios": ratios(seconds, "leanclip"),
            "images_per_second": spread([size / taken for taken in seconds["leanclip"]]),
            "gflops": significant(flops / 1e9),
            "product_gflops_per_second": spread([rate / 1e9 for rate in rates]),
            "share_of_product_rate": spread(shares, 3),
            "difference": significant(difference, 2),
        }
    return results


def file_part(clip: InferenceModel, theirs: Theirs, folder: Path, given: argparse.Namespace) -> Any:
    """A JPEG file to a unit feature."""
    from skimage import data as photographs

    path, square = str(folder / "rocket.jpg"), str(folder / "square.jpg")
    whole = Image.fromarray(photographs.rocket())
    whole.save(path, quality=90)
    whole.crop((0, 0, 427, 427)).save(square, quality=90)

    def difference(file: str, bound: float) -> float:
        ours = clip.embed_images(file, as_torch=True)
        return significant(agree(ours, theirs.file(file).cpu(), bound, file), 2)

    facts = {"difference": difference(square, BOUND), "of this file": difference(path, 1.0)}
    ways: dict[str, Callable[[], object]] = {
        "leanclip": lambda: clip.embed_images(path),
        "transformers": lambda: theirs.file(path).cpu(),
    }
    return compared(ways, 4 * given.rounds) | facts


def prompts_part(
    clip: InferenceModel, theirs: Theirs, prompts: list[str], every: int, given: argparse.Namespace
) -> dict[str, Any]:
    """Words to unit features; the others of every so-many-th batch."""
    batches = [prompts[first : first + BATCH] for first in range(0, len(prompts), BATCH)]
    some = [prompt for batch in batches[::every] for prompt in batch]
    scale = len(prompts) / len(some)
    ours = clip.embed_texts(some, as_torch=True)
    difference = agree(ours, theirs.prompts(some, True).cpu(), BOUND, f"{len(prompts)} prompts")
    ways: dict[str, Callable[[], object]] = {
        "leanclip": lambda: clip.embed_texts(prompts),
        "transformers, to the longest": lambda: theirs.prompts(some, True),
    }
    if every == 1:
        ways["transformers, to 77"] = lambda: theirs.prompts(some, "max_length")
    seconds = in_turn(ways, given.rounds, device=given.device, warm=0 if every > 1 else 1)
    for name in list(seconds)[1:]:
        seconds[name] = [scale * taken for taken in seconds[name]]
    lengths = [len(leanclip.preprocess.tokenizer.encode(prompt)) + 2 for prompt in prompts]
    return {
        "seconds": {way: spread(taken) for way, taken in seconds.items()},
        "ratios": ratios(seconds, "leanclip"),
        "mean_tokens": significant(sum(lengths) / len(lengths), 3),
        "share_of_prompts_that_the_others_encoded": significant(1 / scale, 3),
        "difference": significant(difference, 2),
    }


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--model", default="ViT-B-32-quickgelu")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32, 256])
    given = chosen(parser, words)
    templates, foods = MANY_TEMPLATES, FOODS
    if given.tiny:
        given.model, given.batches = "tiny", [1, 2]
        templates, foods = MANY_TEMPLATES[:2], FOODS[:10]
    results: dict[str, Any] = {}
    with TemporaryDirectory() as name:
        folder = write_model(given.model, Path(name) / "hf", "hf")
        clip, theirs = leanclip.load(folder, device=given.device), Theirs(folder, given.device)
        if "pixels" in given.parts:
            results |= pixels_part(clip, theirs, given.batches, given)
        if "file" in given.parts:
            results["one file"] = file_part(clip, theirs, Path(name), given)
        if "101 prompts" in given.parts:
            prompts = [TEMPLATE.format(food) for food in foods]
            results["101 prompts"] = prompts_part(clip, theirs, prompts, 1, given)
        if "8,080 prompts" in given.parts:
            prompts = [template.format(food) for food in foods for template in templates]
            results["8,080 prompts"] = prompts_part(clip, theirs, prompts, EVERY, given)
    finish(results, given)


if __name__ == "__main__":
    main()
