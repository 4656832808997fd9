"""One photograph and 101 prompts through ViT-B/32, beside transformers' pipeline.

OMP_NUM_THREADS=1 python benchmarks/interact.py > benchmarks/interact.json

Random weights of that size, made here and written in Hugging Face's form, so that both load one
file. Both run in this process, in turn, on the CPU and from the beginning: a JPEG file of 640 x 427
pixels (scikit-image's rocket), or 101 words (Food-101's classes) in the template of transformers'
zero-shot pipeline, to features of unit length.

transformers' `ZeroShotImageClassificationPipeline` pads the prompts to the longest of them
(`padding=True`), not to the context; `padding="max_length"`, to 77, is measured as well. leanclip
does not pad, and computes what all prompts begin with once (model/packed.py).
Milliseconds of processor time (other work may run beside), the median of the rounds; a ratio is
transformers' time over leanclip's, the median of the rounds'.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from skimage import data as photographs
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel
from transformers.pipelines.zero_shot_image_classification import (
    ZeroShotImageClassificationPipeline,
)

import leanclip
from leanclip.images import Preprocess
from leanclip.model.presets import preset
from leanclip.weights import Weights, write_weights

TEMPLATE = "This is a photo of {}."
_FOODS = (
    "apple pie,baby back ribs,baklava,beef carpaccio,beef tartare,beet salad,beignets,bibimbap,"
    "bread pudding,breakfast burrito,bruschetta,caesar salad,cannoli,caprese salad,carrot cake,"
    "ceviche,cheesecake,cheese plate,chicken curry,chicken quesadilla,chicken wings,"
    "chocolate cake,chocolate mousse,churros,clam chowder,club sandwich,crab cakes,creme brulee,"
    "croque madame,cup cakes,deviled eggs,donuts,dumplings,edamame,eggs benedict,escargots,"
    "falafel,filet mignon,fish and chips,foie gras,french fries,french onion soup,french toast,"
    "fried calamari,fried rice,frozen yogurt,garlic bread,gnocchi,greek salad,"
    "grilled cheese sandwich,grilled salmon,guacamole,gyoza,hamburger,hot and sour soup,hot dog,"
    "huevos rancheros,hummus,ice cream,lasagna,lobster bisque,lobster roll sandwich,"
    "macaroni and cheese,macarons,miso soup,mussels,nachos,omelette,onion rings,oysters,pad thai,"
    "paella,pancakes,panna cotta,peking duck,pho,pizza,pork chop,poutine,prime rib,"
    "pulled pork sandwich,ramen,ravioli,red velvet cake,risotto,samosa,sashimi,scallops,"
    "seaweed salad,shrimp and grits,spaghetti bolognese,spaghetti carbonara,spring rolls,steak,"
    "strawberry shortcake,sushi,tacos,takoyaki,tiramisu,tuna tartare,waffles"
)
FOODS = _FOODS.split(",")
PROMPTS = [TEMPLATE.format(food) for food in FOODS]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    assert len(FOODS) == 101
    with TemporaryDirectory() as name:
        folder = make_weights(Path(name))
        image = str(Path(name) / "rocket.jpg")
        from PIL import Image

        Image.fromarray(photographs.rocket()).save(image, quality=90)
        clip = leanclip.load(folder, device="cpu")
        theirs = Theirs(folder)
        report = {"threads": torch.get_num_threads(), "rounds": rounds}
        report["one image"] = compared(
            lambda: clip.embed_images(image), lambda: theirs.image(image), rounds
        )
        for words, padding in (
            ("padded to the longest, as its pipeline", True),
            ("padded to 77", "max_length"),
        ):
            report[f"101 prompts, {words}"] = compared(
                lambda: clip.embed_texts(PROMPTS), lambda p=padding: theirs.texts(p), rounds
            )
    print(json.dumps(report, indent=1))


def make_weights(folder: Path) -> Path:
    torch.manual_seed(0)
    model = leanclip.CLIP(**preset("ViT-B-32-quickgelu"))
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    weights = Weights(folder, "leanclip", tensors, model.config, Preprocess(224))
    write_weights(weights, folder / "hf", "hf")
    return folder / "hf"


class Theirs:
    """The parts of transformers' pipeline, and features as its model makes them."""

    def __init__(self, folder: Path) -> None:
        model = CLIPModel.from_pretrained(folder).eval()
        processor = CLIPImageProcessor.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.pipeline: Any = ZeroShotImageClassificationPipeline(
            model=model, image_processor=processor, tokenizer=tokenizer
        )

    @torch.inference_mode()
    def image(self, path: str) -> np.ndarray:
        """Its own preprocessing of an image, then the features that its forward pass makes."""
        from transformers.image_utils import load_image

        pixels = self.pipeline.image_processor(images=[load_image(path)], return_tensors="pt")
        return unit(self.pipeline.model.get_image_features(**pixels))

    @torch.inference_mode()
    def texts(self, padding: bool | str) -> np.ndarray:
        """The prompts, padded in one batch."""
        tokens = self.pipeline.tokenizer(PROMPTS, return_tensors="pt", padding=padding)
        return unit(self.pipeline.model.get_text_features(**tokens))


def unit(features) -> np.ndarray:
    features = getattr(features, "pooler_output", features)
    return (features / features.norm(dim=-1, keepdim=True)).numpy()


def compared(ours: Callable, theirs: Callable, rounds: int) -> dict:
    difference = float(np.abs(ours() - theirs()).max())  # and a warm-up
    times: dict[str, list[float]] = {"leanclip": [], "transformers": []}
    for _ in range(rounds):
        for name, run in (("leanclip", ours), ("transformers", theirs)):
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    ratios = [b / a for a, b in zip(*times.values(), strict=True)]
    return {
        **{f"{name}, ms": round(1000 * statistics.median(t), 1) for name, t in times.items()},
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "greatest difference of features": difference,
    }


if __name__ == "__main__":
    main()
