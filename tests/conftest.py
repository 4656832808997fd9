"""What the tests share: tiny models, small folders of data, and the command line as a process."""

import contextlib
import io
import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from leanclip.errors import LeanclipError
from leanclip.strict_yaml import dump_yaml

# Models this small gain nothing from a second thread, and processes side by side lose by it.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

DATA = Path(__file__).parent / "data"
PROJECT = Path(__file__).parent.parent

TINY = {  # a model of a moment
    "embed_dim": 16,
    "image_resolution": 32,
    "vision_layers": 2,
    "vision_width": 32,
    "vision_heads": 2,
    "vision_patch_size": 8,
    "context_length": 24,
    "vocab_size": 49408,
    "transformer_width": 32,
    "transformer_heads": 2,
    "transformer_layers": 2,
}


def run_cli(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `leanclip` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from leanclip.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=600,
        check=False,
    )


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """A user's mistake: exit code 2, and a last line that holds every word."""
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in last, last


def noise_image(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """An image of random blocks: nothing like another."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def make_pairs(root: Path, count: int = 12) -> Path:
    """A `pairs` folder of `count` noise images."""
    root.mkdir(parents=True)
    for i in range(count):
        noise_image(i).save(root / f"{i:03d}.png")
        (root / f"{i:03d}.txt").write_text(f"picture number {i}\nimage {i}\n")
    return root


def make_config(path: Path, **sections: Any) -> Path:
    """A config file of the tiny model on pairs in `data`; sections are merged into it."""
    values: dict[str, Any] = {
        "model": dict(TINY),
        "data": {"layout": "pairs", "root": "data", "workers": 0},
        "train": {"epochs": 2, "batch_size": 4, "log_every": 1},
        "optimizer": {"learning_rate": 1e-3},
        "evaluate": {"retrieval": {}},
    }
    for name, section in sections.items():
        both = isinstance(section, dict) and name in values
        values[name] = values[name] | section if both else section
    path.write_text(dump_yaml(values))
    return path


def ranks_of(world_size: int, work: Callable[[int], object], folder: Path) -> list[Any]:
    """What `work(rank)` gives in each of `world_size` processes of a gloo group."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def run(rank: int) -> None:
        store = f"file://{folder}/store-{world_size}"
        if world_size > 1:
            torch.distributed.init_process_group(
                "gloo", init_method=store, rank=rank, world_size=world_size
            )
        try:
            queue.put((rank, work(rank), None))
        except BaseException:
            queue.put((rank, None, traceback.format_exc()))
        if world_size > 1:
            torch.distributed.destroy_process_group()

    processes = [context.Process(target=run, args=(rank,)) for rank in range(world_size)]
    for process in processes:
        process.start()
    results = {}
    for _ in processes:
        rank, result, error = queue.get()
        if error is not None:
            for process in processes:
                process.kill()
            raise AssertionError(f"rank {rank}: {error}")
        results[rank] = result
    for process in processes:
        process.join()
    return [results[rank] for rank in range(world_size)]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with `data` of twelve pairs and `config.yaml`."""
    monkeypatch.chdir(tmp_path)
    make_pairs(tmp_path / "data")
    make_config(tmp_path / "config.yaml")
    return tmp_path


@pytest.fixture
def command(workplace: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`command("train", "-c", ...)` in the workplace, as `run_cli` but in this process.

    A process of its own takes seconds to import torch; the tests that are about processes
    use `run_cli`.
    """
    from leanclip.cli import main

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main(arguments)
            except SystemExit as end:
                code = int(end.code or 0)
            except LeanclipError:
                traceback.print_exc()
                code = 1
        return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
