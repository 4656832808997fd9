"""From one process to two on the CPU, measured; from one GPU to eight, on paper.

    python benchmarks/scaling.py --out benchmarks/scaling.json

Measured: training steps (leanclip's own, with DDP over gloo on loopback) of one rank with the whole
batch and of two ranks with half each, one thread a rank, in turn. The ranks are processes that wait
between rounds. The loss must be the same within 1e-4. Bytes are what the loopback device sent
during the steps of two ranks (/proc/net/dev), over two: sent by a rank in a step. The expected
volume beside it is that of a ring: 2 (W-1)/W of the gradients, (W-1) n E of text features and as
much of their gradients.

On paper: the measured volume, scaled by that formula to W ranks with a batch of their own each (so
that work grows with W), over an assumed bandwidth, none of it while the GPU works; the step's own
time is its FLOPs over an assumed rate. The assumptions stand beside the table. Nothing of that part
was run on a GPU.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from leanclip.config.training import OptimizerConfig, TrainConfig
from leanclip.distributed.collectives import join_group, rank_and_world_size
from leanclip.distributed.wrap_model import wrap_model
from leanclip.model.cost import forward_gflops
from leanclip.preprocess.images import Preprocess
from leanclip.training.optimizer import build_optimizer
from leanclip.training.step import train_step
from measuring import NotTheSame, chosen, finish, options, ratios, significant, spread
from models import random_model, tokens_of, training_batch

PAPER_BATCH = 1024  # pairs of a rank
PAPER_FLOPS = 0.45 * 989e12  # 45% of an H100's published bf16 rate, the aim of this project
PAPER_LINKS = {"450 GB/s (NVLink 4, one way)": 450e9, "50 GB/s (400 Gb/s network)": 50e9}


class Group:
    """The ranks of a run, as processes that make steps when they are told to."""

    def __init__(self, world_size: int, name: str, batch: int, captions: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        words = [sys.executable, __file__, "--once", name, str(batch), captions]
        shared = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        self.ranks = [
            subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(world_size)
        ]
        for rank in self.ranks:
            self._answer(rank)  # ready

    def steps(self, count: int) -> tuple[float, float]:
        """Seconds of a step, and the loss of the first; the slowest rank counts."""
        for rank in self.ranks:
            assert rank.stdin
            rank.stdin.write(f"{count}\n")
            rank.stdin.flush()
        answers = [self._answer(rank) for rank in self.ranks]
        return max(one["seconds"] for one in answers), answers[0]["loss"]

    def close(self) -> None:
        for rank in self.ranks:
            assert rank.stdin
            rank.stdin.close()
            rank.wait()

    @staticmethod
    def _answer(rank: subprocess.Popen) -> dict[str, float]:
        assert rank.stdout
        line = rank.stdout.readline()
        if not line:
            raise RuntimeError("a rank ended")
        return json.loads(line)


def work(name: str, batch_size: int, captions: str) -> None:
    """A rank: steps on its part of the batch, as many as each line of stdin says."""
    import time

    torch.set_num_threads(1)
    join_group(torch.device("cpu"))
    rank, world_size = rank_and_world_size()
    model = random_model(name)
    towers = wrap_model(model, TrainConfig())
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1e-6))
    side = model.config.image_resolution
    batch = training_batch(side, tokens_of(captions, batch_size))
    for field in ("images", "tokens", "indices", "labels"):
        setattr(batch, field, getattr(batch, field)[rank::world_size])

    def step() -> float:
        return train_step(
            model, optimizer, batch, Preprocess(side), rate=1e-6, towers=towers
        ).loss.item()

    step()
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        losses = [step() for _ in range(int(line))]
        seconds = (time.perf_counter() - start) / len(losses)
        print(json.dumps({"seconds": seconds, "loss": losses[0]}), flush=True)
    os._exit(0)  # as leanclip itself: destroying a gloo group may hang


def loopback_bytes() -> int:
    """What was sent over the loopback device so far."""
    found = re.search(r"^\s*lo:\s*(.*)$", Path("/proc/net/dev").read_text(), re.M)
    assert found
    return int(found[1].split()[8])


class Volume(NamedTuple):
    """Of a ring, in bytes that a rank sends in a step."""

    gradients: float
    features: float

    @classmethod
    def of(cls, parameters: int, pairs: int, embed_dim: int, world_size: int) -> "Volume":
        return cls(
            4 * parameters * 2 * (world_size - 1) / world_size,
            4 * 2 * (world_size - 1) * pairs * embed_dim,
        )


def measured(name: str, batch: int, steps: int, given: argparse.Namespace) -> dict[str, Any]:
    groups = {
        f"{size} rank{'s' if size > 1 else ''}": Group(size, name, batch, "realistic")
        for size in (1, 2)
    }
    losses = [group.steps(1)[1] for group in groups.values()]
    if abs(losses[0] - losses[1]) > 1e-4 * abs(losses[0]):
        raise NotTheSame(f"loss of one rank {losses[0]}, of two {losses[1]}")
    seconds: dict[str, list[float]] = {way: [] for way in groups}
    sent = []
    for _ in range(given.rounds):
        for way, group in groups.items():
            before = loopback_bytes()
            seconds[way].append(group.steps(steps)[0])
            if way == "2 ranks":
                sent.append((loopback_bytes() - before) / 2 / steps)
    for group in groups.values():
        group.close()
    model = random_model(name)
    parameters, embed_dim = model.parameter_count(), model.config.embed_dim
    expected = Volume.of(parameters, batch // 2, embed_dim, 2)
    found = ratios(seconds, "2 ranks")["1 rank"]
    return {
        "batch": batch,
        "images_per_second": {w: spread([batch / t for t in s]) for w, s in seconds.items()},
        "speed-up": found,
        "mb_sent_by_a_rank_in_a_step": spread([count / 1e6 for count in sent]),
        "mb_expected_of_a_ring": significant(sum(expected) / 1e6),
    }


def on_paper(name: str, factor: float) -> dict[str, Any]:
    """Efficiency from 1 to 8 GPUs; `factor` is the measured volume over the expected."""
    model = random_model(name)
    length = 16
    flops = 3 * PAPER_BATCH * 1e9 * forward_gflops(model.config, length)
    seconds = flops / PAPER_FLOPS
    results: dict[str, Any] = {
        "assumed": {
            "pairs of a rank": PAPER_BATCH,
            "tokens of a caption": length,
            "flops_per_second": PAPER_FLOPS,
            "overlap of communication and work": "none",
            "gradients": "float32",
        },
        "seconds of a step without communication": significant(seconds, 3),
    }
    for world_size in (2, 4, 8):
        volume = Volume.of(model.parameter_count(), PAPER_BATCH, model.config.embed_dim, world_size)
        bytes_ = factor * sum(volume)
        results[f"{world_size} ranks"] = {
            "mb_sent_by_a_rank_in_a_step": significant(bytes_ / 1e6),
            "efficiency": {
                link: significant(seconds / (seconds + bytes_ / speed), 3)
                for link, speed in PAPER_LINKS.items()
            },
        }
    return results


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--models", nargs="+", default=["quickstart", "ViT-B-32"])
    given = chosen(parser, words)
    if given.once:
        work(given.once[0], int(given.once[1]), given.once[2])
    paper = "ViT-B-32"
    if given.tiny:
        given.models, paper = ["tiny"], "tiny"
    results: dict[str, Any] = {"measured": {}}
    for name in given.models:
        steps = 1 if "ViT" in name or given.tiny else 20
        results["measured"][name] = measured(name, 8 if given.tiny else 32, steps, given)
    last = results["measured"][given.models[-1]]
    factor = last["mb_sent_by_a_rank_in_a_step"]["median"] / last["mb_expected_of_a_ring"]
    results["on paper"] = {paper: on_paper(paper, factor)}
    finish(results, given)


if __name__ == "__main__":
    main()
