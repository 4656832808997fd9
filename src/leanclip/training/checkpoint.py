"""The state of training on disk: saved whole or not at all, found again, verified.

    run/checkpoints/step-00000600/
        model.safetensors     weights          config.json      architecture and preprocessing
        training.safetensors  AdamW's moments, and the random states of every rank; where the
                              weights above are a mean or merged, the model's own beside
        state.json            step, position in the data, what was counted
        manifest.json         size and SHA-256 of every file above; written last
        shards/               with train.sharding fsdp: weights and moments, a file a rank

A checkpoint is written to a temporary folder, synced, and renamed: a folder with the name of a
step is complete. Nothing in it is a pickle, but one file of shards/ (sharded_checkpoint.py). The
folder is also a folder of weights that `leanclip.load` and `--load` take. `latest` names the last
one, `best` the one of the best metric.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from leanclip.distributed.collectives import (
    from_first,
    gather_rows,
    raise_if_any,
    rank_and_world_size,
    tensors_from_first,
)
from leanclip.distributed.fsdp import is_sharded, placed_as
from leanclip.errors import WeightsError
from leanclip.io.files import digest, digests, sync, write_text
from leanclip.model import CLIP
from leanclip.preprocess.images import Preprocess
from leanclip.training.finetune import Tuning
from leanclip.weights import (
    SHARDS,
    Weights,
    describe_weights,
    load_into,
    read_weights,
    save_weights,
)


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
    batch_size: int = 0  # pairs of a step, over all ranks
    new: list[str] = field(default_factory=list)  # parameters that the loaded weights had not
    baseline: dict[str, float] = field(default_factory=dict)  # metrics before the first step
    best: Best | None = None
    loss_scale: dict[str, float] | None = None  # state of precision fp16's GradScaler
    loaded: str | None = None  # digest of the weights that the run began with; "": of none
    run: str = ""  # drawn when the run began; "": by an older leanclip


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

    Called by every rank; rank 0 writes, or each its own shards. The old ones go when the new one
    is verified; the one that `progress.best` names stays.

    Raises:
        OSError: it could not be written; what was there is as it was.
    """
    folder = root / f"step-{progress.step:08d}"
    temporary = root / f".{folder.name}.tmp"
    random_states, hashes = _random_states(), {}
    rank, has_shards = rank_and_world_size()[0], is_sharded(model)
    if rank > 0 and not has_shards:
        return folder
    try:
        problem = _begin(temporary) if rank == 0 else ""
        if has_shards:
            raise_if_any(problem=problem)  # the other ranks write into that folder too
            from leanclip.training.sharded_checkpoint import save_shards

            save_shards(temporary / SHARDS, model, optimizer)
        elif problem:
            raise OSError(problem)
        if rank > 0:
            return folder
        if has_shards:
            describe_weights(temporary, model.config, preprocess)
            tensors = random_states
        else:
            weights = tuning.weights() if tuning else model.state_dict()
            sha256 = save_weights(temporary, weights, model.config, preprocess)
            hashes["model.safetensors"] = sha256
            tensors = _moments(model, optimizer) | random_states
            tensors |= tuning.state() if tuning else {}
        save_file(tensors, temporary / "training.safetensors")
        (temporary / "state.json").write_text(json.dumps(vars(progress)))
        _write_manifest(temporary, hashes)
        for problem in _problems(temporary):
            raise OSError(f"{problem}, right after it was written")
    except (OSError, SafetensorError) as error:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{folder}: cannot be written: {error}") from None
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    sync(root)
    write_text(root / "latest", folder.name + "\n")
    best = progress.best and f"step-{progress.best.step:08d}"
    if best and (root / best).is_dir():
        write_text(root / "best", best + "\n")
    found = _newest_first(root)
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
    newest_first = _newest_first(root)
    return progress_if_any(newest_first[0]) if newest_first else None


def progress_if_any(folder: Path) -> Progress | None:
    """As `progress_of`; None where it cannot be read."""
    try:
        return progress_of(folder)
    except (OSError, ValueError, TypeError):
        return None


def restore(
    folder: Path, model: CLIP, optimizer: torch.optim.Optimizer, tuning: Tuning | None = None
) -> Progress:
    """Put a checkpoint's weights, moments and random states back.

    Every rank calls this; the first one reads and gives the others what it read. Only shards are
    read by all.

    Raises:
        WeightsError: the checkpoint is of another model.
    """
    tensors = tensors_from_first(lambda: load_file(folder / "training.safetensors"))
    if from_first(lambda: is_in_shards(folder)):
        from leanclip.training.sharded_checkpoint import load_shards

        load_shards(folder / SHARDS, model, optimizer)
    elif is_sharded(model):
        own, weights = model.state_dict(), _weights_of(folder)
        model.load_state_dict({k: placed_as(v, own[k]) for k, v in weights.tensors.items()})
    elif tuning is None or not tuning.restore(tensors):
        load_into(model, _weights_of(folder))
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if state:
            # All of it: the fused AdamW keeps its count of steps on the device too.
            optimizer.state[parameter] = {k: placed_as(v, parameter) for k, v in state.items()}
    rank = rank_and_world_size()[0]
    if rank < len(tensors["random.cpu"]):  # a rank more than then goes on with its own seed
        # Clones: PyTorch reads a state from the beginning of its storage, not from the row's.
        torch.set_rng_state(tensors["random.cpu"][rank].clone())
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"][rank].clone())
    return from_first(lambda: progress_of(folder))


def manifest_digests(root: Path) -> dict[str, str]:
    """The digests of the checkpoints' manifests under `root`, by their names, the newest first."""
    found = {}
    for folder in _newest_first(root):
        with suppress(OSError):  # it has none, or was removed just now
            found[folder.name] = digest(folder / "manifest.json")
    return found


def is_whole(folder: Path) -> bool:
    """Whether every file of a checkpoint is as its manifest has it."""
    return next(_problems(folder), None) is None


def is_in_shards(folder: Path) -> bool:
    """Whether a checkpoint was written in shards."""
    return (folder / SHARDS).is_dir()


def merge(source: Path, destination: Path) -> Path:
    """Write a sharded checkpoint, or a run's newest, as a normal one; the folder it was read from.

    Raises:
        WeightsError: there is no such checkpoint, it is damaged, or not sharded.
        OSError: the destination is there already, or cannot be written.
    """
    from leanclip.training.sharded_checkpoint import read_shards

    folder = source
    if (source / "checkpoints").is_dir():
        folder = newest(source / "checkpoints")[0] or source
    for problem in _problems(folder):
        raise WeightsError(f"{problem}; name a run's folder or one of its checkpoints")
    if not (folder / SHARDS).is_dir():
        raise WeightsError(f"{folder}: is not in shards; it can be used as it is")
    if destination.exists():
        raise OSError(f"{destination}: is there already; name another folder")
    temporary = destination.with_name(f".{destination.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = read_shards(folder / SHARDS)
    config = json.loads((folder / "config.json").read_text())
    weights = {k.removeprefix("model."): t for k, t in tensors.items() if k.startswith("model.")}
    save_file(weights, temporary / "model.safetensors", {"format": "pt"})
    config["sha256"] = digest(temporary / "model.safetensors")
    (temporary / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    moments = {k: t for k, t in tensors.items() if k.startswith("optimizer.")}
    random_states = load_file(folder / "training.safetensors")
    save_file(moments | random_states, temporary / "training.safetensors")
    shutil.copyfile(folder / "state.json", temporary / "state.json")
    _write_manifest(temporary, {"model.safetensors": config["sha256"]})
    temporary.rename(destination)
    return folder


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint under `root` that is whole, and why newer ones are not."""
    skipped = []
    for folder in _newest_first(root):
        problem = next(_problems(folder), None)
        if problem is None:
            return folder, skipped
        skipped.append(problem)
    return None, skipped


def sweep(root: Path) -> None:
    """Remove what runs that were killed left half-written under `root`.

    Raises:
        OSError: it cannot be removed.
    """
    for folder in root.glob(".step-*.tmp"):
        shutil.rmtree(folder)
    for file in root.glob(".*.part"):
        file.unlink()


def _weights_of(folder: Path) -> Weights:
    """The weights of a checkpoint, on every rank as the first one reads them."""
    found: list[Weights] = []

    def read() -> Weights:
        found.append(read_weights(folder))
        return replace(found[0], tensors={})

    weights = from_first(read)
    return replace(weights, tensors=tensors_from_first(lambda: found[0].tensors))


def _begin(temporary: Path) -> str:
    """Make an empty folder to write in, without what killed runs left; what went wrong."""
    try:
        sweep(temporary.parent)
        temporary.mkdir(parents=True)
    except OSError as error:
        return str(error)
    return ""


def _problems(folder: Path) -> Iterator[str]:
    """What is wrong with a checkpoint by its manifest."""
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        expected = {name: (facts["size"], facts["sha256"]) for name, facts in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        yield f"{folder}: has no manifest"
        return
    whole = {}
    for name, (size, sha256) in expected.items():
        path = folder / name
        if path.is_file() and path.stat().st_size == size:
            whole[path] = sha256
        else:
            yield f"{path}: is missing or cut short"
    for (path, sha256), found in zip(whole.items(), digests(whole), strict=True):
        if found != sha256:
            yield f"{path}: differs from its checksum"


def _newest_first(root: Path) -> list[Path]:
    """The checkpoints by their steps, which only ever grow in a run."""
    return sorted(root.glob("step-*"), reverse=True)


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


def _write_manifest(folder: Path, hashes: Mapping[str, str]) -> None:
    """Size and SHA-256 of every file; `hashes` are those that are known."""
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    facts = {
        name: {"size": path.stat().st_size, "sha256": hashes.get(name) or digest(path)}
        for name, path in files.items()
    }
    (folder / "manifest.json").write_text(json.dumps(facts, indent=1))
    for path in (*folder.rglob("*"), folder):
        sync(path)
