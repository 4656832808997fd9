"""What the tiled loss costs: memory at a large batch, time against the plain equations.

    python benchmarks/loss.py > benchmarks/loss.json

Memory: in a fresh process for each kind, the rise of the most resident memory (VmHWM) over forward
and backward of 65,536 pairs of 512 values, above what the features take. Time: forward and backward
at 16,384 pairs, tiled and dense in turn in one process with two threads, the best of each.
"""

import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from leanclip.loss import Kind, contrastive_loss

KINDS: tuple[Kind, ...] = ("clip", "multi-positive", "siglip")
WIDTH, MEMORY_BATCH, TIME_BATCH, ROUNDS = 512, 65_536, 16_384, 3


def features(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    zimg, ztxt = (F.normalize(torch.randn(batch, WIDTH), dim=-1) for _ in range(2))
    return zimg.requires_grad_(), ztxt.requires_grad_()


def forward_and_backward(
    kind: Kind, zimg: torch.Tensor, ztxt: torch.Tensor, *, is_tiled: bool
) -> float:
    zimg.grad = ztxt.grad = None
    scale = torch.tensor(50.0, requires_grad=True)
    groups = torch.arange(len(zimg)) // 2
    bias = torch.tensor(-10.0, requires_grad=True) if kind == "siglip" else None
    loss = contrastive_loss(
        zimg, ztxt, scale, kind=kind, bias=bias, groups=groups, is_tiled=is_tiled
    )
    loss.backward()
    return loss.item()


def peak_bytes() -> int:
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def resident_bytes() -> int:
    found = re.search(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def measure_memory(kind: Kind) -> None:
    forward_and_backward(kind, *features(64), is_tiled=True)  # what the first call loads
    zimg, ztxt = features(MEMORY_BATCH)
    before = resident_bytes()
    forward_and_backward(kind, zimg, ztxt, is_tiled=True)
    print(json.dumps({"gb_above_features": round((peak_bytes() - before) / 1e9, 3)}))


def measure_time(kind: Kind) -> dict[str, float]:
    zimg, ztxt = features(TIME_BATCH)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(ROUNDS):
        for is_tiled in seconds:
            began = time.perf_counter()
            forward_and_backward(kind, zimg, ztxt, is_tiled=is_tiled)
            seconds[is_tiled].append(time.perf_counter() - began)
    tiled, dense = min(seconds[True]), min(seconds[False])
    return {
        "tiled_seconds": round(tiled, 2),
        "dense_seconds": round(dense, 2),
        "ratio": round(tiled / dense, 3),
    }


def main() -> None:
    torch.set_num_threads(2)
    if len(sys.argv) > 1:
        measure_memory(next(kind for kind in KINDS if kind == sys.argv[1]))
        return
    results: dict[str, object] = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "width": WIDTH,
        "memory_batch": MEMORY_BATCH,
        "time_batch": TIME_BATCH,
        "rounds": ROUNDS,
    }
    for kind in KINDS:
        done = subprocess.run(
            [sys.executable, __file__, kind], capture_output=True, text=True, check=True
        )
        results[kind] = json.loads(done.stdout) | measure_time(kind)
        print(kind, results[kind], file=sys.stderr)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
