r"""The loss: time and memory against the number of pairs, dense and in tiles, there and back.

    python benchmarks/loss.py --out benchmarks/loss.json
    python benchmarks/loss.py --device cuda --pairs 32768 65536 131072 262144 \
      --memory 32768 65536 131072 262144 --add --out benchmarks/loss.json

Features of 512 values, float32. Time: forward and backward of the tiled loss and of the plain
equations on the whole matrix (`is_tiled=False`), in turn in one process; loss and gradients must
agree within 1e-5 (norm over norm) before. Memory: in a fresh process for each, the rise of the most
resident memory over forward and backward, above what the features take (VmHWM; on CUDA what
PyTorch allocated). The dense loss keeps a matrix of N x N and its gradient; where that does not fit
on a GPU, there is leanclip's figure alone.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from leanclip.losses import Kind, contrastive_loss
from measuring import (
    agree,
    chosen,
    compared,
    finish,
    in_own_process,
    options,
    peak_bytes,
    resident_bytes,
    significant,
)

KINDS: tuple[Kind, ...] = ("clip", "multi-positive", "siglip")
WIDTH, BOUND = 512, 1e-5
WAYS = {"leanclip": True, "dense": False}


def features(pairs: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    zimg, ztxt = (F.normalize(torch.randn(pairs, WIDTH, device=device), dim=-1) for _ in range(2))
    return zimg.requires_grad_(), ztxt.requires_grad_()


def there_and_back(
    kind: Kind, zimg: torch.Tensor, ztxt: torch.Tensor, *, is_tiled: bool
) -> dict[str, torch.Tensor]:
    """The loss and all gradients."""
    zimg.grad = ztxt.grad = None
    scale = torch.tensor(50.0, device=zimg.device, requires_grad=True)
    groups = torch.arange(len(zimg), device=zimg.device) // 2
    bias = None
    if kind == "siglip":
        bias = torch.tensor(-10.0, device=zimg.device, requires_grad=True)
    loss = contrastive_loss(
        zimg, ztxt, scale, kind=kind, bias=bias, groups=groups, is_tiled=is_tiled
    )
    loss.backward()
    assert zimg.grad is not None
    assert ztxt.grad is not None
    return {"loss": loss.detach(), "images": zimg.grad, "texts": ztxt.grad}


def time_of(kind: Kind, pairs: int, given: argparse.Namespace) -> dict[str, Any]:
    both = features(pairs, given.device)
    try:
        ours, dense = (there_and_back(kind, *both, is_tiled=on) for on in (True, False))
    except torch.OutOfMemoryError:
        alone = {"leanclip": lambda: there_and_back(kind, *both, is_tiled=True)}
        return compared(alone, given.rounds, device=given.device, warm=0)
    difference = agree(ours, dense, BOUND, f"{kind} of {pairs} pairs")
    ways: dict[str, Callable[[], object]] = {
        way: lambda on=on: there_and_back(kind, *both, is_tiled=on) for way, on in WAYS.items()
    }
    found = compared(ways, given.rounds, device=given.device, warm=0)
    return found | {"difference": significant(difference, 2)}


def once(words: Sequence[str]) -> int:
    """Bytes above the features."""
    kind, pairs, way, device = words
    kinds: dict[str, Kind] = {str(one): one for one in KINDS}
    which = kinds[kind]
    there_and_back(which, *features(64, device), is_tiled=WAYS[way])  # what the first call loads
    both = features(int(pairs), device)
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        there_and_back(which, *both, is_tiled=WAYS[way])
        return torch.cuda.max_memory_allocated() - before
    before = resident_bytes()
    there_and_back(which, *both, is_tiled=WAYS[way])
    return peak_bytes() - before


def memory_of(kind: Kind, pairs: int, device: str) -> dict[str, float]:
    """Gigabytes of each way that fits."""
    found = {}
    for way in WAYS:
        try:
            found[way] = in_own_process(__file__, kind, pairs, way, device) / 1e9
        except RuntimeError as error:
            if "OutOfMemoryError" not in str(error):
                raise
    return {way: significant(gb, 3) for way, gb in found.items()}


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--pairs", nargs="+", type=int, default=[1024, 2048, 4096, 8192])
    parser.add_argument("--memory", nargs="*", type=int, default=[4096, 8192, 16384])
    given = chosen(parser, words)
    if given.once:
        print(json.dumps(once(given.once)))
        return
    kinds = KINDS
    if given.tiny:
        given.pairs, given.memory, kinds = [64, 128], given.memory and [128], KINDS[:1]
    results: dict[str, Any] = {}
    for kind in kinds:
        results[kind] = {f"{n:,} pairs": time_of(kind, n, given) for n in given.pairs}
    memory = {f"{n:,} pairs": memory_of(kinds[0], n, given.device) for n in given.memory}
    finish(results | {"gb above the features": {kinds[0]: memory}}, given)


if __name__ == "__main__":
    main()
