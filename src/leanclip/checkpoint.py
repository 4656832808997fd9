"""The state of training on disk: saved whole or not at all, found again, verified.

    run/checkpoints/step-00000600/
        model.safetensors     weights          config.json      architecture and preprocessing
        training.safetensors  AdamW's moments, and the random states of every rank; where the
                              weights above are a mean or merged, the model's own beside
        state.json            step, position in the data, what was counted
        manifest.json         size and SHA-256 of every file above; written last

A checkpoint is written to a temporary folder, synced, and renamed: a folder with the name of a
step is complete. Nothing in it is a pickle. The folder is also a folder of weights that
`leanclip.load` and `--load` take. `latest` names the last one, `best` the one of the best metric.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from leanclip.distributed import gather_rows, rank_and_world_size
from leanclip.fetch import digest
from leanclip.finetune import Tuning
from leanclip.images import Preprocess
from leanclip.model import CLIP
from leanclip.tracking import write_text
from leanclip.weights import load_into, read_weights, save_weights


class Best(NamedTuple):
    """The best evaluation so far, by a metric of which more is better."""

    metric: str
    value: float
    step: int
    since: int  # evaluations after it


@dataclass(frozen=True)
class Progress:
    """How far a run has come, in plain values."""

    step: int
    epoch: int
    sample: int  # samples of this epoch that are done
    samples: int  # trained on, all in all
    sources: list[int]  # the same by source, of a mixture
    seconds: float  # spent on training until here
    dataset_size: int = 0  # samples of an epoch
    new: list[str] = field(default_factory=list)  # parameters that the loaded weights had not
    before: dict[str, float] = field(default_factory=dict)  # metrics before the first step
    best: Best | None = None
    loss_scale: list[float] | None = None  # of precision fp16


def save(
    root: Path,
    progress: Progress,
    model: CLIP,
    optimizer: torch.optim.Optimizer,
    preprocess: Preprocess,
    *,
    keep: int,
    tuning: Tuning | None = None,
) -> Path:
    """Write a checkpoint under `root`, then remove all but the `keep` newest; its folder.

    Called by every rank; rank 0 writes. The old ones go when the new one is verified; the one
    that `progress.best` names stays.

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
        weights = tuning.weights() if tuning else model.state_dict()
        save_weights(temporary, weights, model.config, preprocess)
        tensors = _moments(model, optimizer) | random_states | (tuning.state() if tuning else {})
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
    best = progress.best and f"step-{progress.best.step:08d}"
    if best and (root / best).is_dir():
        write_text(root / "best", best + "\n")
    found = _by_age(root)
    place = found.index(folder)
    for old in (*found[:place], *found[place + keep :]):  # one ahead was damaged and passed over
        if old.name != best:
            shutil.rmtree(old)
    return folder


def progress_of(folder: Path) -> Progress:
    """How far the run of a checkpoint had come."""
    facts = json.loads((folder / "state.json").read_text())
    return Progress(**facts | {"best": Best(*facts["best"]) if facts.get("best") else None})


def last_progress(root: Path) -> Progress | None:
    """How far the run with these checkpoints has come, by what the newest says, unverified."""
    newest_first = _by_age(root)
    try:
        return progress_of(newest_first[0]) if newest_first else None
    except (OSError, ValueError, TypeError):
        return None


def restore(
    folder: Path, model: CLIP, optimizer: torch.optim.Optimizer, tuning: Tuning | None = None
) -> Progress:
    """Put a checkpoint's weights, moments and random states back.

    Raises:
        WeightsError: the checkpoint is of another model.
    """
    tensors = load_file(folder / "training.safetensors")
    if tuning is None or not tuning.restore(tensors):
        load_into(model, read_weights(folder))
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
    return progress_of(folder)


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint under `root` that is whole, and why newer ones are not."""
    skipped = []
    for folder in _by_age(root, unreadable=1 << 62):  # so that it is looked at, and named
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


def _by_age(root: Path, *, unreadable: int = -1) -> list[Path]:
    """The checkpoints, the newest first: by how far the data was read.

    Steps would not do: a run that goes on with more ranks counts fewer of them. Where the state
    cannot be read, `unreadable` stands for the epoch.
    """

    def position(folder: Path) -> tuple[int, int, str]:
        try:
            state = json.loads((folder / "state.json").read_text())
            return state["epoch"], state["sample"], folder.name
        except (OSError, ValueError, KeyError):
            return unreadable, -1, folder.name

    return sorted(root.glob("step-*"), key=position, reverse=True)


def _moments(model: CLIP, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"optimizer.{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
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
