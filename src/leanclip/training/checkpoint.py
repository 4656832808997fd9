"""Checkpoints of a run: written whole or not at all, verified, and the newest intact one found.

    run/checkpoints/step-00000600/
        model.safetensors     weights          config.json      architecture and preprocessing
        training.safetensors  optimizer state and the random states of all ranks; and the model's
                              own weights, where those above are averaged or merged
        state.json            `Progress`
        manifest.json         size and SHA-256 of every file above; written last
        shards/               with train.sharding fsdp: weights and optimizer state, a file per rank

A checkpoint is written to a temporary folder, flushed to the disk and renamed. It is also a folder
of weights that `leanclip.load` and `--load` take. The file `latest` names the newest checkpoint,
`best` that with the best metric.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from leanclip.distributed.collectives import (
    from_first,
    gather_rows,
    rank_and_world_size,
    tensors_from_first,
)
from leanclip.distributed.wrap_model import is_sharded
from leanclip.errors import WeightsError
from leanclip.io.files import digest, digests, sync, write_text
from leanclip.model import CLIP
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.text import Tokenizer
from leanclip.training.finetune import Tuning
from leanclip.weights import SHARDS, describe_weights, read_tokenizer, save_weights
from leanclip.weights.tokenizer import store


class Best(NamedTuple):
    """The best evaluation so far, by a metric of which more is better."""

    metric: str
    value: float
    step: int
    since: int  # evaluations after it


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int
    epoch: int
    sample: int  # samples of this epoch that are done
    samples: int  # trained on in all epochs
    sources: list[int]  # the same for each source of a mixture
    seconds: float  # of training, over all starts
    dataset_size: int = 0  # samples per epoch
    batch_size: int = 0  # pairs per step, over all ranks
    new: list[str] = field(default_factory=list)  # parameters that the loaded weights lacked
    baseline: dict[str, float] = field(default_factory=dict)  # metrics before the first step
    best: Best | None = None
    loss_scale: dict[str, float] | None = None  # state of the GradScaler, for fp16
    loaded: str | None = None  # digest of the initial weights; "": trained from scratch
    run: str = ""  # random id of the run


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
    """Write a checkpoint under `root`, remove all but the `keep` newest and the best.

    Every rank calls this; the first one writes, or each its own shards.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: it could not be written; the earlier checkpoints are unchanged.
    """
    folder = root / f"step-{progress.step:08d}"
    temporary = root / f".{folder.name}.tmp"
    random_states, known = _random_states(), {}
    rank, has_shards = rank_and_world_size()[0], is_sharded(model)
    if rank > 0 and not has_shards:
        return folder
    try:
        if has_shards:
            from leanclip.training.sharded_checkpoint import save_shards

            from_first(lambda: _make_empty(temporary))
            save_shards(temporary / SHARDS, model.state_dict() | _moments(model, optimizer))
            if rank > 0:
                return folder
            describe_weights(temporary, model.config, preprocess, tokenizer=model.tokenizer)
            tensors = random_states
        else:
            _make_empty(temporary)
            weights = tuning.weights() if tuning else model.state_dict()
            sha256 = save_weights(
                temporary, weights, model.config, preprocess, tokenizer=model.tokenizer
            )
            known = {"model.safetensors": sha256}
            tensors = _moments(model, optimizer) | random_states
            tensors |= tuning.state() if tuning else {}
        save_file(tensors, temporary / "training.safetensors")
        (temporary / "state.json").write_text(json.dumps(vars(progress)))
        _write_manifest(temporary, known)
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
    _remove_old(root, folder, keep, best)
    return folder


def progress_of(folder: Path) -> Progress:
    """The progress of a checkpoint."""
    facts = json.loads((folder / "state.json").read_text())
    return Progress(**facts | {"best": Best(*facts["best"]) if facts.get("best") else None})


def progress_if_any(folder: Path) -> Progress | None:
    """The progress of a checkpoint; None if it cannot be read."""
    try:
        return progress_of(folder)
    except (OSError, ValueError, TypeError):
        return None


def last_progress(root: Path) -> Progress | None:
    """The progress of the newest checkpoint under `root`, which is not verified."""
    newest_first = _newest_first(root)
    return progress_if_any(newest_first[0]) if newest_first else None


def restore(
    folder: Path, model: CLIP, optimizer: torch.optim.Optimizer, tuning: Tuning | None = None
) -> Progress:
    """Restore weights, optimizer state and random states from a verified checkpoint.

    Every rank calls this. The first one reads and broadcasts; with train.sharding fsdp, or from a
    sharded checkpoint, each rank reads its own part.
    """
    tensors = tensors_from_first(lambda: load_file(folder / "training.safetensors"))
    has_shards = from_first(lambda: is_sharded_checkpoint(folder))
    if has_shards or is_sharded(model):
        from leanclip.training.sharded_checkpoint import load_shards

        load_shards(folder / SHARDS if has_shards else folder, model, optimizer)
    else:
        if tuning is None or not tuning.restore(tensors):
            weights = tensors_from_first(lambda: load_file(folder / "model.safetensors"))
            model.load_state_dict(weights)
        for name, parameter in model.named_parameters():
            prefix = f"optimizer.{name}."
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if state:
                # The step count too is on the parameter's device: AdamW is fused.
                optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in state.items()}
    rank = rank_and_world_size()[0]
    if rank < len(tensors["random.cpu"]):  # additional ranks keep their initial states
        # Clones: PyTorch reads a state from the start of its storage, not of the row's.
        torch.set_rng_state(tensors["random.cpu"][rank].clone())
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"][rank].clone())
    return from_first(lambda: progress_of(folder))


def manifest_digests(root: Path) -> dict[str, str]:
    """The digest of each checkpoint's manifest under `root`, by name, the newest first."""
    found = {}
    for folder in _newest_first(root):
        with suppress(OSError):  # it has none, or was removed just now
            found[folder.name] = digest(folder / "manifest.json")
    return found


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint under `root`, and what is wrong with newer ones."""
    skipped = []
    for folder in _newest_first(root):
        problem = next(_problems(folder), None)
        if problem is None:
            return folder, skipped
        skipped.append(problem)
    return None, skipped


def is_intact(folder: Path) -> bool:
    """Whether every file of a checkpoint agrees with its manifest."""
    return next(_problems(folder), None) is None


def is_sharded_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint is sharded."""
    return (folder / SHARDS).is_dir()


def merge(source: Path, destination: Path) -> Path:
    """Write a sharded checkpoint as a normal one.

    Args:
        source: a checkpoint, or a run's folder for its newest one.
        destination: a new folder.

    Returns:
        The folder of the checkpoint that was read.

    Raises:
        WeightsError: there is no such checkpoint, it is damaged, or not sharded.
        OSError: the destination exists, or cannot be written.
    """
    from leanclip.training.sharded_checkpoint import read_shards

    folder = source
    if (source / "checkpoints").is_dir():
        folder = newest(source / "checkpoints")[0] or source
    for problem in _problems(folder):
        raise WeightsError(f"{problem}; name a run's folder or one of its checkpoints")
    if not is_sharded_checkpoint(folder):
        raise WeightsError(f"{folder}: is not sharded; it can be used without merging")
    if destination.exists():
        raise OSError(f"{destination}: exists already; name another folder")
    temporary = destination.with_name(f".{destination.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = read_shards(folder / SHARDS)
    config = json.loads((folder / "config.json").read_text())
    moments = {name: t for name, t in tensors.items() if name.startswith("optimizer.")}
    weights = {name: t for name, t in tensors.items() if name not in moments}
    save_file(weights, temporary / "model.safetensors", {"format": "pt"})
    config["sha256"] = digest(temporary / "model.safetensors")
    config["tokenizer"] = store(temporary, read_tokenizer(folder) or Tokenizer())
    (temporary / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    random_states = load_file(folder / "training.safetensors")
    save_file(moments | random_states, temporary / "training.safetensors")
    shutil.copyfile(folder / "state.json", temporary / "state.json")
    _write_manifest(temporary, {"model.safetensors": config["sha256"]})
    temporary.rename(destination)
    return folder


def sweep(root: Path) -> None:
    """Remove the temporary files of killed runs under `root`.

    Raises:
        OSError: one cannot be removed.
    """
    for folder in root.glob(".step-*.tmp"):
        shutil.rmtree(folder)
    for file in root.glob(".*.part"):
        file.unlink()


def _make_empty(temporary: Path) -> None:
    """Make an empty folder to write a checkpoint in."""
    sweep(temporary.parent)
    temporary.mkdir(parents=True)


def _remove_old(root: Path, last: Path, keep: int, best: str | None) -> None:
    """Remove all checkpoints but the `keep` newest, of which `last` is the first, and the best."""
    newest_first = _newest_first(root)
    place = newest_first.index(last)
    # Checkpoints of later steps were damaged: the run was resumed from an earlier one.
    for old in (*newest_first[:place], *newest_first[place + keep :]):
        if old.name != best:
            shutil.rmtree(old)


def _problems(folder: Path) -> Iterator[str]:
    """How a checkpoint differs from its manifest."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        expected = {folder / name: (one["size"], one["sha256"]) for name, one in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        yield f"{folder}: has no manifest"
        return
    for path, (size, _) in expected.items():
        if not path.is_file() or path.stat().st_size != size:
            yield f"{path}: is missing or cut short"
            return
    for (path, (_, sha256)), found in zip(expected.items(), digests(expected), strict=True):
        if found != sha256:
            yield f"{path}: differs from its checksum"


def _write_manifest(folder: Path, known: Mapping[str, str]) -> None:
    """Write size and SHA-256 of every file, and flush all to the disk; `known` SHA-256 by name."""
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    others = [name for name in files if name not in known]
    sha256 = dict(known) | dict(zip(others, digests(files[name] for name in others), strict=True))
    facts = {n: {"size": path.stat().st_size, "sha256": sha256[n]} for n, path in files.items()}
    (folder / "manifest.json").write_text(json.dumps(facts, indent=1))
    for path in (*folder.rglob("*"), folder):
        sync(path)


def _newest_first(root: Path) -> list[Path]:
    """The checkpoints under `root` by step."""
    return sorted(root.glob("step-*"), reverse=True)


def _moments(model: CLIP, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"optimizer.{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _random_states() -> dict[str, torch.Tensor]:
    """The states of the random number generators, a row for each rank."""
    states = {"random.cpu": gather_rows(torch.get_rng_state()[None])[0]}
    if torch.cuda.is_available():
        states["random.cuda"] = gather_rows(torch.cuda.get_rng_state()[None])[0]
    return states
