"""`leanclip app` under load: seconds to each answer, and how many passes the model took.

    python benchmarks/app.py        # about a minute

A ViT-B/32 with random weights in a process of its own on loopback; clients in this one, all
starting at once, each with an image of its own (512 x 384 JPEG) and the same ten labels. For
comparison the same requests one after the other. Prints JSON.
"""

import asyncio
import io
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2
import numpy as np
import torch
from PIL import Image

from leanclip.images import Preprocess
from leanclip.model import CLIP
from leanclip.model.presets import preset
from leanclip.weights import save_weights

LABELS = [f"label {i}" for i in range(10)]
CLIENTS = (1, 10, 200)
ROUNDS = 3


def main() -> None:
    """Start the server, ask, and print what was measured."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "model"
        weights.mkdir()
        model = CLIP(**preset("ViT-B-32"))
        preprocess = Preprocess(model.config.image_resolution)
        save_weights(weights, model.state_dict(), model.config, preprocess, provenance="")
        del model
        server = subprocess.Popen(
            [
                *(sys.executable, "-c", "from leanclip.cli import main; main()"),
                *("app", "--model", str(weights), "--port", "0"),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stdout
            found = re.match(r"http://\S+/", server.stdout.readline())
            assert found
            print(json.dumps(measure(found[0]), indent=1))
        finally:
            server.terminate()
            server.wait()


def measure(address: str) -> dict[str, object]:
    """Latencies of so many clients at once."""
    while httpx2.get(f"{address}healthz").status_code != 200:
        time.sleep(0.1)
    photographs = iter(photograph(i) for i in range(10_000))  # never the same, as they are kept
    results: dict[str, object] = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "model": "ViT-B/32, float32",
        "rounds": ROUNDS,
    }
    asyncio.run(ask(address, [next(photographs)]))  # the labels are encoded
    for clients in CLIENTS:
        taken: list[float] = []
        seconds, lost, passes = 0.0, 0, 0
        for _ in range(ROUNDS):
            images = [next(photographs) for _ in range(clients)]
            before = httpx2.get(f"{address}healthz").json()["passes"]
            began = time.perf_counter()
            found = asyncio.run(ask(address, images))
            seconds += time.perf_counter() - began
            passes += httpx2.get(f"{address}healthz").json()["passes"] - before
            taken += [one for one in found if one is not None]
            lost += sum(one is None for one in found)
        results[f"{clients} at once"] = {
            "lost": lost,
            "passes a round": round(passes / ROUNDS, 1),
            "seconds a round": round(seconds / ROUNDS, 3),
            "latency_ms": {
                f"p{share}": round(1000 * float(np.percentile(taken, share)))
                for share in (50, 90, 95, 99, 100)
            },
        }
    return results


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
