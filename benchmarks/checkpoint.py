"""Saving and loading a training state, beside torch.save and torch.load.

    python benchmarks/checkpoint.py --out benchmarks/checkpoint.json

ViT-B/32 with AdamW's moments. leanclip writes safetensors, reads them once for their checksums,
flushes them to the disk, and renames; it never runs a pickle. `torch.save` writes
what the page cache takes: with `and synced` it is made to reach the disk too, as a checkpoint must.
Loading verifies the checksums (`newest`) and puts weights, moments and random states back;
`torch.load` is with `weights_only=True`. In turn, in one process, the file in the page cache. What
was loaded must be what was saved, to the bit, by both.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from leanclip.config.training import OptimizerConfig
from leanclip.preprocess.images import Preprocess
from leanclip.training import checkpoint
from leanclip.training.optimizer import build_optimizer
from measuring import agree, chosen, compared, finish, options, significant
from models import random_model


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All tensors of a training state, by name."""
    moments = {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    return {**model.state_dict(), **moments}


def trained(name: str) -> tuple[Any, torch.optim.Optimizer]:
    """A model, and an optimiser that has made a step."""
    model = random_model(name)
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1e-4))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) / 100
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def measure(name: str, folder: Path, rounds: int) -> dict[str, Any]:
    model, optimizer = trained(name)
    root, plain = folder / "checkpoints", folder / "state.pt"
    root.mkdir()
    progress = checkpoint.Progress(1, 0, 0, 0, [], 0.0)
    preprocess = Preprocess(model.config.image_resolution)

    def ours() -> object:
        return checkpoint.save(root, progress, model, optimizer, preprocess, keep=1)

    def theirs() -> None:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, plain)

    def synced() -> None:
        theirs()
        with plain.open("rb") as file:
            os.fsync(file.fileno())

    saving: dict[str, Callable[[], object]] = {
        "leanclip": ours,
        "torch.save": theirs,
        "torch.save, and synced": synced,
    }
    saved = compared(saving, rounds)
    size = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
    before = {key: value.clone() for key, value in state_of(model, optimizer).items()}

    def load() -> None:
        found = checkpoint.newest(root)[0]
        assert found is not None
        checkpoint.restore(found, model, optimizer)

    def unverified() -> None:
        checkpoint.restore(next(root.glob("step-*")), model, optimizer)

    def torch_load() -> None:
        state = torch.load(plain, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    loading: dict[str, Callable[[], object]] = {
        "leanclip": load,
        "leanclip, not verified": unverified,
        "torch.load": torch_load,
    }
    for way, run in loading.items():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        optimizer.state.clear()
        run()
        agree(state_of(model, optimizer), before, 0.0, way)
    loaded = compared(loading, rounds)
    return {"gb": significant(size / 1e9, 3), "save": saved, "load": loaded}


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--models", nargs="+", default=["ViT-B-32"])
    parser.add_argument("--folder", help="of the disk to measure; that of temporary files if not")
    given = chosen(parser, words)
    if given.tiny:
        given.models = ["tiny"]
    results = {}
    for name in given.models:
        with TemporaryDirectory(dir=given.folder) as folder:
            results[name] = measure(name, Path(folder), given.rounds)
    finish(results, given)


if __name__ == "__main__":
    main()
