"""`leanclip app` under load: seconds to each answer, and what it buys to take requests together.

    python benchmarks/app.py --out benchmarks/app.json

Random weights, of the quickstart's size and of ViT-B/32, in a process of its own on loopback;
clients in this one, all starting at once, each with an image of its own (512 x 384 JPEG) and the
same ten labels: seconds to each answer, and the server's processor time. Then the model's thread
alone, in this process: images that are waiting, taken together and taken one by one, in turn, by
processor time. Rounds are five of the small model and one of ViT-B/32. Two cores serve both the
server and its clients; none may be lost.
"""

import asyncio
import io
import itertools
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import torch
from PIL import Image

from leanclip.app.worker import Worker, embed_images
from leanclip.inference.load import load
from measuring import chosen, command_line, finish, options
from models import QUICKSTART, write_model

LABELS = [f"label {i}" for i in range(10)]
CLIENTS = (1, 10, 200)
SHARES = (50, 90, 95, 99, 100)


def main(words: Sequence[str] | None = None) -> None:
    """Start a server for each model, ask, and say what was measured."""
    parser = options(__doc__)
    given = chosen(parser, words)
    models, clients = {QUICKSTART: given.rounds, "ViT-B-32": 1}, CLIENTS
    if given.tiny:
        models, clients = {"tiny": 1}, (1, 2)
    results: dict[str, Any] = {}
    for name, rounds in models.items():
        with tempfile.TemporaryDirectory() as folder:
            weights = write_model(name, Path(folder) / "model")
            with serving(weights) as (address, process):
                under_load = measure(address, process, rounds, clients)
            results[name] = {
                "rounds": rounds,
                "clients at once": under_load,
                "processor ms an image, of images that wait": together_or_not(weights, rounds),
            }
    finish(results, given)


@contextmanager
def serving(weights: Path) -> Iterator[tuple[str, int]]:
    """A server: its address, once it answers, and its process."""
    command = command_line("app", "--model", str(weights), "--port", "0")
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        found = re.match(r"http://\S+/", server.stdout.readline())
        assert found
        while httpx2.get(f"{found[0]}healthz").status_code != 200:
            time.sleep(0.1)
        yield found[0], server.pid
    finally:
        server.terminate()
        server.wait()


def measure(address: str, process: int, rounds: int, at_once: Sequence[int]) -> dict[str, object]:
    """Latencies of so many clients at once."""
    photographs = map(photograph, itertools.count())  # never the same, as features are kept
    results: dict[str, object] = {}
    asyncio.run(ask(address, [next(photographs)]))  # the labels are encoded
    for clients in at_once:
        taken: list[float | None] = []
        seconds, passes, worked = 0.0, 0, processor_seconds(process)
        for _ in range(rounds):
            images = [next(photographs) for _ in range(clients)]
            before = httpx2.get(f"{address}healthz").json()["passes"]
            began = time.perf_counter()
            taken += asyncio.run(ask(address, images))
            seconds += time.perf_counter() - began
            passes += httpx2.get(f"{address}healthz").json()["passes"] - before
        answered = [1000 * one for one in taken if one is not None]
        results[str(clients)] = {
            "lost": len(taken) - len(answered),
            "passes a round": round(passes / rounds, 1),
            "seconds a round": round(seconds / rounds, 3),
            "processor seconds a round": round((processor_seconds(process) - worked) / rounds, 3),
            "latency_ms": {f"p{p}": round(float(np.percentile(answered, p))) for p in SHARES},
        }
    return results


def processor_seconds(process: int) -> float:
    """What a process has used so far, all its threads."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def together_or_not(weights: Path, rounds: int) -> dict[str, object]:
    """Processor milliseconds an image of 10 and of 64, by passes of up to 64 and of one."""
    clip = load(weights)
    side = clip.preprocess.resolution
    pixels = torch.randint(0, 256, (64, 3, side, side), dtype=torch.uint8)
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for count in (10, 64):
            for name, most in (("together", 64), ("one by one", 1)):
                worker = Worker(lambda: clip, max_batch=most)
                worker.start()
                worker.loaded.result()
                asyncio.run(embed(worker, pixels[:1]))
                began = time.process_time()
                asyncio.run(embed(worker, pixels[:count]))
                taken = 1000 * (time.process_time() - began) / count
                found.setdefault(str(count), {}).setdefault(name, []).append(taken)
    return {
        count: {name: round(statistics.median(taken), 2) for name, taken in by_name.items()}
        for count, by_name in found.items()
    }


async def embed(worker: Worker, pixels: torch.Tensor) -> None:
    """Features of images, all requested at once."""
    await asyncio.gather(*(worker.run(embed_images, one) for one in pixels))


async def ask(address: str, images: list[bytes]) -> list[float | None]:
    """Seconds to each answer; None for one that is lost."""
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(limits=limits, timeout=300) as client:

        async def one(image: bytes) -> float | None:
            began = time.perf_counter()
            files, data = {"image": image}, {"labels": LABELS}
            try:
                answer = await client.post(f"{address}api/classify", files=files, data=data)
            except httpx2.HTTPError:
                return None
            return time.perf_counter() - began if answer.status_code == 200 else None

        return await asyncio.gather(*map(one, images))


def photograph(seed: int) -> bytes:
    """A JPEG of smooth noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((512, 384), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


if __name__ == "__main__":
    main()
