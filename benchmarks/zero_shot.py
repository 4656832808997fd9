"""Zero-shot classifiers of 101 classes on the CPU: what prompts without padding are worth.

    OMP_NUM_THREADS=1 python benchmarks/zero_shot.py > benchmarks/zero_shot.json

A text tower of ViT-B/32's size with random weights; Food-101's names with its one published
template, and with 80 made-up ones of the length that ImageNet's have. `leanclip` is
build_classifier: distinct prompts in batches of one length. The other way encodes all prompts at
77 tokens in batches of 256, with the same model. Classifiers must agree before anything is timed.
Of 8,080 prompts the other way encodes every eighth batch, and its time is multiplied by as many
prompts as it left out: all prompts have 77 tokens there, so that all batches take the same.
Processor time counts, of one thread; the two take turns.
"""

import json
import os
import platform
import statistics
import sys
import time

import torch
from torch.nn import functional as F

from leanclip import CLIP, build_classifier, tokenize
from leanclip.data.samples import fill
from leanclip.model.presets import preset
from leanclip.prompts import PROMPTS

BATCH = 256
ROUNDS = {1: 5, 80: 2}  # by the number of templates
ADJECTIVES = ("good", "bad", "bright", "dark", "blurry", "clean", "dirty", "low resolution")
KINDS = (
    "a {adjective} photo of a {{}}.",
    "a {adjective} photo of the {{}}.",
    "a photo of a {adjective} {{}}.",
    "a photo of the {adjective} {{}}.",
    "a {adjective} picture of one {{}}.",
    "a {adjective} drawing of a {{}}.",
    "a {adjective} close-up photo of the {{}}.",
    "a {adjective} sculpture of a {{}}.",
    "itap of a {adjective} {{}}.",
    "a {adjective} {{}} in a video game.",
)
MANY = tuple(kind.format(adjective=word) for kind in KINDS for word in ADJECTIVES)


@torch.inference_mode()
def padded(
    model: CLIP, classes: tuple[str, ...], templates: tuple[str, ...], step: int = 1
) -> tuple[torch.Tensor, float]:
    """Unit features (M, E) of every `step`-th batch of prompts, and the share of them."""
    prompts = [prompt for name in classes for prompt in fill(templates, name)]
    parts, done = [], 0
    for first in range(0, len(prompts), BATCH * step):
        tokens = tokenize(prompts[first : first + BATCH], model.context_length)
        parts.append(F.normalize(model.encode_text(tokens), dim=-1))
        done += len(tokens)
    return torch.cat(parts), done / len(prompts)


def timed(model: CLIP, templates: tuple[str, ...]) -> dict[str, object]:
    classes = PROMPTS["food101"].classes
    step = 8 if len(templates) > 1 else 1
    ours, others, share = [], [], 1.0
    for _ in range(ROUNDS[len(templates)]):
        start = time.process_time()
        classifier = build_classifier(model, classes, templates, batch_size=BATCH)
        ours.append(time.process_time() - start)
        start = time.process_time()
        features, share = padded(model, classes, templates, step)
        others.append((time.process_time() - start) / share)
        check(classifier, features, templates, step)
    lengths = (tokenize([p for c in classes for p in fill(templates, c)]) == 49407).int()
    return {
        "prompts": len(classes) * len(templates),
        "mean_tokens": round((lengths.argmax(dim=1) + 1).float().mean().item(), 1),
        "leanclip_seconds": round(statistics.median(ours), 2),
        "padded_seconds": round(statistics.median(others), 2),
        "ratio": round(statistics.median(b / a for a, b in zip(ours, others, strict=True)), 2),
        "rounds": [[round(a, 2), round(b, 2)] for a, b in zip(ours, others, strict=True)],
        "padded_share_measured": round(share, 3),
    }


def check(
    classifier: torch.Tensor, features: torch.Tensor, templates: tuple[str, ...], step: int
) -> None:
    """That both ways give the same; of a part of the prompts, for the classes that are whole."""
    size, rows = len(templates), 0
    batches = features.split(BATCH)
    for number, batch in enumerate(batches):
        first = number * step * BATCH
        for label in range(-(-first // size), (first + len(batch)) // size):
            own = batch[label * size - first : (label + 1) * size - first]
            mean = F.normalize(own.mean(dim=0), dim=0)
            torch.testing.assert_close(classifier[label], mean, atol=1e-5, rtol=0)
            rows += 1
    assert rows > 0


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    arch = preset("ViT-B-32") | {"vision_layers": 1}  # images take no part
    model = CLIP(**arch).eval()
    one = PROMPTS["food101"].templates
    build_classifier(model, PROMPTS["food101"].classes[:8], one)  # warm
    facts: dict[str, object] = {
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
    }
    for name, templates in (("1 template", one), ("80 templates", MANY)):
        facts[name] = timed(model, templates)
        print(json.dumps({name: facts[name]}), flush=True, file=sys.stderr)
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
