"""The state of training on disk: saved whole or not at all, found again, verified.

    run/checkpoints/step-00000600/
        model.safetensors     weights          config.json      architecture and preprocessing
        training.safetensors  AdamW's moments, and the random states of every rank
        state.json            step, position in the data, what was counted
        manifest.json         size and SHA-256 of every file above; written last

A checkpoint is written to a temporary folder, synced, and renamed: a folder with the name of a
step is complete. Nothing in it is a pickle. The folder is also a folder of weights that
`leanclip.load` and `--load` take.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from leanclip.distributed import gather_rows, rank_and_world_size
from leanclip.fetch import digest
from leanclip.images import Preprocess
from leanclip.model import CLIP
from leanclip.tracking import write_text
from leanclip.weights import load_into, read_weights, save_weights


@dataclass(frozen=True)
class Progress:
    """How far a run has come, in plain values."""

    step: int
    epoch: int
    sample: int  # samples of this epoch that are done
    samples: int  # trained on, all in all
    sources: list[int]  # the same by source, of a mixture
    seconds: float  # spent on training until here


def save(
    root: Path,
    progress: Progress,
    model: CLIP,
    optimizer: torch.optim.Optimizer,
    preprocess: Preprocess,
    *,
    keep: int,
) -> Path:
    """Write a checkpoint under `root`, then remove all but the `keep` newest; its folder.

    Called by every rank; rank 0 writes. The old ones go when the new one is verified.

    Raises:
        OSError: it could not be written; what was there is as it was.
    """
    folder = root / f"step-{progress.step:08d}"
    random_states = _random_states()
    if rank_and_world_size()[0] > 0:
        return folder
    temporary = root / f".{folder.name}.tmp"
    for stale in root.glob(".step-*.tmp"):
        shutil.rmtree(stale)
    try:
        temporary.mkdir(parents=True)
        save_weights(temporary, model.state_dict(), model.config, preprocess)
        tensors = _moments(model, optimizer) | random_states
        save_file(tensors, temporary / "training.safetensors")
        (temporary / "state.json").write_text(json.dumps(vars(progress)))
        _write_manifest(temporary)
        for problem in _problems(temporary):
            raise OSError(f"{problem}, right after it was written")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{folder}: cannot be written: {error}") from None
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    _sync(root)
    write_text(root / "latest", folder.name + "\n")
    found = _by_age(root)
    place = found.index(folder)
    for old in (*found[:place], *found[place + keep :]):  # one ahead was damaged and passed over
        shutil.rmtree(old)
    return folder


def restore(folder: Path, model: CLIP, optimizer: torch.optim.Optimizer) -> Progress:
    """Put a checkpoint's weights, moments and random states back.

    Raises:
        WeightsError: the checkpoint is of another model.
    """
    load_into(model, read_weights(folder))
    tensors = load_file(folder / "training.safetensors")
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if state:
            # All of it: the fused AdamW keeps its count of steps on the device too.
            optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in state.items()}
    rank = rank_and_world_size()[0]
    if rank < len(tensors["random.cpu"]):  # a rank more than then goes on with its own seed
        # Clones: PyTorch reads a state from the beginning of its storage, not from the row's.
        torch.set_rng_state(tensors["random.cpu"][rank].clone())
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"][rank].clone())
    return Progress(**json.loads((folder / "state.json").read_text()))


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint under `root` that is whole, and why newer ones are not."""
    skipped = []
    for folder in _by_age(root):
        problem = next(_problems(folder), None)
        if problem is None:
            return folder, skipped
        skipped.append(problem)
    return None, skipped


def _problems(folder: Path) -> Iterator[str]:
    """What is wrong with a checkpoint by its manifest."""
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        yield f"{folder}: has no manifest"
        return
    for name, facts in manifest.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != facts["size"]:
            yield f"{path}: is missing or cut short"
        elif digest(path) != facts["sha256"]:
            yield f"{path}: differs from its checksum"


def _by_age(root: Path) -> list[Path]:
    """The checkpoints, the newest first: by how far the data was read.

    Steps would not do: a run that goes on with more ranks counts fewer of them.
    """

    def position(folder: Path) -> tuple[int, int, str]:
        try:
            state = json.loads((folder / "state.json").read_text())
            return state["epoch"], state["sample"], folder.name
        except (OSError, ValueError, KeyError):
            return -1, -1, folder.name

    return sorted(root.glob("step-*"), key=position, reverse=True)


def _moments(model: CLIP, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"optimizer.{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def _random_states() -> dict[str, torch.Tensor]:
    """The generators' states, a row for each rank."""
    states = {"random.cpu": gather_rows(torch.get_rng_state()[None])[0]}
    if torch.cuda.is_available():
        states["random.cuda"] = gather_rows(torch.cuda.get_rng_state()[None])[0]
    return states


def _write_manifest(folder: Path) -> None:
    facts = {
        path.name: {"size": path.stat().st_size, "sha256": digest(path)}
        for path in sorted(folder.iterdir())
    }
    (folder / "manifest.json").write_text(json.dumps(facts, indent=1))
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
