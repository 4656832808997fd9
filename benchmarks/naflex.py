r"""Training on patches of drawn lengths (NaFlex): images a second, beside one length for all.

    python benchmarks/naflex.py --out benchmarks/naflex.json

Steps of leanclip (forward, loss, backward, AdamW) on batches that are on the device already: of 256
patches each, and of 64, 144 and 256, a batch of each in turn, with as many patches in every batch.
The images have different proportions and fill their patches as far as whole rows do. The text tower
is as deep as the image tower; captions are of 16 tokens.
"""

from collections.abc import Sequence
from itertools import cycle
from statistics import median

import torch

from leanclip.config.training import OptimizerConfig, TrainConfig
from leanclip.data.batch import Batch
from leanclip.data.batch_sizes import BatchSizes
from leanclip.distributed.wrap_model import wrap_model
from leanclip.model import CLIP
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.patches import Patches, patched_size
from leanclip.training.optimizer import build_optimizer
from leanclip.training.step import train_step
from measuring import chosen, finish, in_turn, options, ratios, significant

LENGTHS = (64, 144, 256)
PATCH = 16
MODELS = {  # width, layers, batch of 256 patches
    "Ti": (192, 12, 8),
    "tiny": (32, 2, 2),
}
PROPORTIONS = ((480, 640), (640, 480), (500, 500), (375, 500), (640, 360), (427, 640))


def model_of(name: str) -> CLIP:
    """A SigLIP-like model with resized positions, of random weights."""
    width, layers, _ = MODELS[name]
    torch.manual_seed(0)
    return CLIP(
        embed_dim=width, image_resolution=256, vision_layers=layers, vision_width=width,
        vision_heads=max(1, width // 64), vision_patch_size=PATCH, vision_class_token=False,
        vision_positions="resized", vision_pool="attn", pre_norm=False, patch_bias=True,
        activation="gelu_tanh", transformer_width=width, transformer_layers=layers,
        transformer_heads=max(1, width // 64),
    )  # fmt: skip


def batch_of(images: int, patches: int) -> Batch:
    """Random images of so many patches at most, with captions of 16 tokens."""
    sizes = [
        patched_size(h, w, PATCH, patches) for _, (h, w) in zip(range(images), cycle(PROPORTIONS))
    ]
    shapes = torch.tensor(sizes) // PATCH
    values = torch.randint(0, 256, (images, patches, 3 * PATCH**2), dtype=torch.uint8)
    tokens = torch.randint(1, 49406, (images, 16))
    tokens[:, -1] = 49407
    index = torch.arange(images)
    return Batch(Patches(values, shapes), tokens, index, index)


def main(words: Sequence[str] | None = None) -> None:
    """Measure both ways and write the record."""
    given = chosen(options(__doc__), words)
    name = "tiny" if given.tiny else "Ti"
    model = model_of(name).to(given.device)
    settings = TrainConfig(precision="bf16" if given.device == "cuda" else "fp32")
    towers = wrap_model(model, settings)
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1e-6), {})
    preprocess = Preprocess(256, resize="naflex", patch_size=PATCH, max_patches=max(LENGTHS))
    sizes = BatchSizes(1 << 20, MODELS[name][2], 0, LENGTHS).sizes
    batches = {patches: batch_of(images, patches) for images, patches in sizes if patches}

    def step(patches: int) -> None:
        train_step(
            model, optimizer, batches[patches], preprocess,
            rate=1e-6, settings=settings, towers=towers,
        )  # fmt: skip

    ways = {str(n): lambda n=n: step(n) for n in sorted(LENGTHS, reverse=True)}
    seconds = in_turn(ways, given.rounds, device=given.device)
    images = {str(patches): len(batch) for patches, batch in batches.items()}
    drawn = [sum(round_) / sum(images.values()) for round_ in zip(*seconds.values(), strict=True)]
    always = [one / images[str(max(LENGTHS))] for one in seconds[str(max(LENGTHS))]]
    per_image = {"drawn": drawn, "always 256": always}
    results = {
        "images": images,
        "milliseconds": {way: significant(1e3 * median(taken)) for way, taken in seconds.items()},
        "images_per_second": {k: significant(1 / median(taken)) for k, taken in per_image.items()},
        "ratio": ratios(per_image, "drawn")["always 256"],
    }
    finish({name: results}, given)


if __name__ == "__main__":
    main()
