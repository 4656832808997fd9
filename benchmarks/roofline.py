"""The ceiling of this machine, and the share of it that a training step and encode_image reach.

    python benchmarks/roofline.py --out benchmarks/roofline.json

Measured: products of square matrices in float32 and bfloat16, and of the shapes of the model's
perceptron; memory bandwidth by copying (bytes read and written) and by adding two arrays into a
third, over arrays far larger than the caches. Then, in turn in one process, as the machine's speed
drifts: the float32 product (bfloat16 on CUDA), leanclip's training step at realistic caption
lengths, and `encode_image`. FLOPs are counted by PyTorch's flop counter while the step runs.
`share` is what the step's FLOPs over its time are of the product's; `at the ceiling` is the
images a second if every second were one of products. Bytes that a step must move at least are the
optimiser's: weights, gradients and two moments, of which it reads four and writes three.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from leanclip.preprocess.images import normalize
from leanclip.training.step import AUTOCAST
from measuring import chosen, finish, in_turn, options, product_rate, significant, spread
from models import lengths_of
from train_step import BATCHES, Ours, flops_of, inputs_of

MOVED = 7 * 4  # bytes for each parameter by AdamW in float32


def rates(given: argparse.Namespace) -> dict[str, Any]:
    """GFLOP/s of products, GB/s of memory."""
    size, rows = (64, 64) if given.tiny else (2048, 1600)  # 32 images of 50 tokens
    width = 64 if given.tiny else 768
    ways: dict[str, Callable[[], object]] = {}
    flops: dict[str, int] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        ways[name], flops[name] = product_rate(given.device, dtype, size)
    x, w = torch.randn(rows, width), torch.randn(4 * width, width)
    x, w = x.to(given.device), w.to(given.device)
    name = f"float32, ({rows}, {width}) by ({width}, {4 * width})"
    ways[name] = lambda: torch.nn.functional.linear(x, w)
    flops[name] = 2 * rows * width * 4 * width
    count = 1 << (16 if given.tiny else 27)
    a, b, c = (torch.ones(count, device=given.device) for _ in range(3))
    ways |= {"copy": lambda: b.copy_(a), "add": lambda: torch.add(a, b, out=c)}
    moved = {"copy": 8 * count, "add": 12 * count}
    seconds = in_turn(ways, given.rounds, device=given.device, warm=2)
    return {
        "product_gflops_per_second": {
            name: spread([flops[name] / t / 1e9 for t in seconds[name]]) for name in flops
        },
        "memory_gb_per_second": {
            name: spread([moved[name] / t / 1e9 for t in seconds[name]]) for name in moved
        },
    }


def shares(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """What a step and encode_image reach of the product's rate."""
    inputs = inputs_of(name, "realistic", given)
    step = Ours(inputs, given)
    size, preprocess = len(inputs.tokens), inputs.preprocess
    dtype = AUTOCAST.get(given.precision)
    device = torch.device(given.device)

    def encode() -> torch.Tensor:
        pixels = normalize(inputs.batch.images, preprocess.mean, preprocess.std)
        with (
            torch.inference_mode(),
            torch.autocast(device.type, dtype, enabled=dtype is not None),
        ):
            return step.model.encode_image(pixels)

    with FlopCounterMode(display=False) as counter:
        encode()
    flops = {"training step": flops_of(inputs, given), "encode_image": counter.get_total_flops()}
    product, of_product = product_rate(given.device, dtype or torch.float32, given.product)
    ways: dict[str, Callable[[], object]] = {
        "training step": step.run,
        "encode_image": encode,
        "product": product,
    }
    seconds = in_turn(ways, given.rounds, device=given.device)
    at = [of_product / taken for taken in seconds.pop("product")]
    found: dict[str, Any] = {
        "batch": size,
        "mean_tokens": significant(float(lengths_of(inputs.tokens).float().mean()), 3),
        "product_gflops_per_second": spread([rate / 1e9 for rate in at]),
    }
    for way, taken in seconds.items():
        found[way] = {
            "gflops": significant(flops[way] / 1e9),
            "images_per_second": spread([size / t for t in taken]),
            "at the ceiling": spread([size * rate / flops[way] for rate in at]),
            "share": spread([flops[way] / t / r for t, r in zip(taken, at, strict=True)], 3),
        }
    found["optimiser_gb"] = significant(step.model.parameter_count() * MOVED / 1e9, 3)
    return found


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__, batch=None, compile=False)
    parser.add_argument("--models", nargs="*", default=["ViT-B-32", "quickstart"])
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--product", type=int)
    given = chosen(parser, words)
    if given.tiny:
        given.models, given.product = ["tiny"], 64
    assert all(name in BATCHES or given.batch for name in given.models)
    results = rates(given) | {"models": {name: shares(name, given) for name in given.models}}
    finish(results, given)


if __name__ == "__main__":
    main()
