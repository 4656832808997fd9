"""What a run starts from: a checkpoint, weights, or scratch; the same on every rank.

    plan, weights and checkpoints of every rank -> compared with the first rank's -> Chosen

The first rank chooses the checkpoint. The others only check that what they see does not contradict
it; the checkpoint itself is sent from the first rank, so the run's folder may be on its disk alone.
Every error is raised on every rank, with the number of the rank that differs.
"""

import hashlib
import json
import logging
import uuid
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import nn

from leanclip.config.schema import Config, load_config
from leanclip.config.sections import differences
from leanclip.data import Dataset
from leanclip.data.batch import Position
from leanclip.data.formats.mixture import Mixture
from leanclip.distributed.collectives import (
    all_gather_object,
    barrier,
    from_first,
    rank_and_world_size,
)
from leanclip.errors import ConfigError, LeanclipError, WeightsError
from leanclip.model import CLIP
from leanclip.training import checkpoint
from leanclip.training.plan import Plan
from leanclip.weights import Weights, fingerprint, load_into, read_weights
from leanclip.weights.read import Architecture

log = logging.getLogger("leanclip")

# Settings, or groups, that may change when a run resumes: they do not change its weights, except
# for the rounding of micro-batches.
FREE_SETTINGS = (
    "output_dir",
    "device",
    "load",
    "load_arch",
    "load_partial",
    "data.workers",
    "data.cache_gigabytes",
    "data.max_bad_fraction",
    "train.micro_batches",
    "train.log_every",
    "train.report_to",
    "train.checkpoint_activations",
    "finetune.cache_features",
    "evaluate",
    "checkpoint",
)
# Those that may differ between ranks. Of `load` the weights are compared.
FREE_AMONG_RANKS = (
    "output_dir",
    "device",
    "load",
    "data.workers",
    "data.cache_gigabytes",
    "train.report_to",
)


class Chosen(NamedTuple):
    """The checkpoint that a run resumes from."""

    folder: Path  # on the first rank
    progress: checkpoint.Progress
    config: Config  # of the last start
    is_sharded: bool
    digests: dict[str, str]  # of the manifests of all checkpoints there, by name


def check_same_plan(plan: Plan) -> None:
    """Compare configuration, size of the data, classes and steps on all ranks.

    Raises:
        ConfigError: a rank's differ from the first rank's.
    """
    data = {"data": plan.dataset}
    data |= {f"evaluate.{task.name}": task.dataset for task in plan.tasks}
    data |= {"evaluate.retention": plan.retention.dataset} if plan.retention else {}
    facts: dict[str, object] = {f"samples of {name}": len(one) for name, one in data.items()}
    facts |= {f"classes of {name} (digest)": _digest_classes(one) for name, one in data.items()}
    facts |= {
        "preprocessing": str(plan.preprocess),
        "tokeniser (digest)": plan.tokenizer.fingerprint()[:12],
        "steps": plan.steps,
        "weights with --load": plan.config.load is not None,
    }
    plans: list[tuple[Config, dict[str, object]]] = all_gather_object((plan.config, facts))
    config, first = plans[0]
    for rank, (other, found) in enumerate(plans):
        changed = differences(other, config, ignore=FREE_AMONG_RANKS)
        changed += [
            f"{name}: {found.get(name)} there, {first.get(name)} here"
            for name in sorted(first.keys() | found.keys())
            if found.get(name) != first.get(name)
        ]
        if changed:
            raise ConfigError(
                f"rank {rank} (there) differs from rank 0 (here): {_first_three(changed)}; start "
                f"all ranks with the same command and the same data"
            )


def choose_checkpoint(plan: Plan, must_resume: bool) -> Chosen | None:
    """The newest intact checkpoint of the run's folder, as the first rank sees it.

    Raises:
        ConfigError: the folder holds a run of another configuration or of other weights; or
            another rank sees another checkpoint there; or `must_resume` and there is none.
    """
    chosen = from_first(partial(_choose, plan, must_resume))
    if plan.config.train.sharding == "fsdp" and rank_and_world_size()[1] > 1:
        _check_shared(plan.folder)
    _raise_first(_contradiction(plan, chosen))
    return chosen


def plan_from(plan: Plan, chosen: Chosen) -> Plan:
    """The plan from a checkpoint on: its steps count, in batches of this run's size."""
    done = chosen.progress
    left = plan.sizes.rest(Position(done.epoch, done.sample))  # whole batches of the epoch
    here = (done.epoch + 1) * plan.steps_per_epoch - len(left)
    plan = replace(plan, offset=done.step - here)
    if done.dataset_size not in (0, len(plan.dataset)):
        log.warning(
            "the data has %d samples per epoch, and had %d when the checkpoint was written: the "
            "rest of this epoch has another order, and may repeat or leave out samples",
            *(len(plan.dataset), done.dataset_size),
        )
    elif done.batch_size not in (0, plan.batch_size):
        log.info(
            "the global batch was %d and is %d now: %d steps are left",
            *(done.batch_size, plan.batch_size, plan.last_step - done.step),
        )
    log.info("resuming from %s, step %d of %d", chosen.folder, done.step, plan.last_step)
    return plan


def load_initial_weights(plan: Plan, model: CLIP) -> checkpoint.Progress:
    """Begin a run: load the weights of `config.load`, if set, into the model.

    From scratch the model has its initial weights, except for `train.initial_logit_bias`.

    Raises:
        ConfigError: a setting of `finetune` needs loaded weights.
        WeightsError: the weights cannot be read, do not fit, or differ between ranks.
    """
    config, new, digest = plan.config, [], ""
    if config.load is not None:
        weights, digest = read_on_all_ranks(config.load, config.load_arch)
        new = _load(plan, model, weights)
        if model.tokenizer != plan.tokenizer:
            raise WeightsError(
                f"{config.load}: its tokeniser is not known before its weights are read; convert "
                f"it first: leanclip convert {config.load} OUT"
            )
        own = weights.preprocess
        if own and (own.mean, own.std) != (plan.preprocess.mean, plan.preprocess.std):
            log.warning(
                "%s: was trained with mean %s, std %s; this run has data.mean %s, data.std %s",
                *(config.load, own.mean, own.std, plan.preprocess.mean, plan.preprocess.std),
            )
        log.info("starting from the weights of %s", config.load)
    bias = config.train.initial_logit_bias
    if bias is not None and model.logit_bias is not None:
        nn.init.constant_(model.logit_bias, bias)
    for name in ("lock_image", "lock_text", "lora_rank"):
        if config.load is None and getattr(config.finetune, name) is not None:
            raise ConfigError(f"finetune.{name}: needs loaded weights; give --load")
    run = from_first(lambda: uuid.uuid4().hex)
    return checkpoint.Progress(0, 0, 0, 0, [], 0.0, new=new, loaded=digest, run=run)


def config_to_record(config: Config, chosen: Chosen | None) -> Config:
    """The settings for config.yaml, which keeps naming the weights that the run began with."""
    if chosen is None or config.load is not None:
        return config
    names = ("load", "load_arch", "load_partial")
    return config.model_copy(update={name: getattr(chosen.config, name) for name in names})


def read_on_all_ranks(source: str | Path, arch: Architecture | None = None) -> tuple[Weights, str]:
    """Weights that each rank reads for itself, and their digest, which is equal on all ranks.

    Raises:
        WeightsError: they cannot be read, or a rank's differ from the first rank's.
    """
    weights, digest, error = None, "", None
    try:
        weights = read_weights(source, arch=arch)
        digest = fingerprint(weights.tensors)
    except (LeanclipError, OSError) as found:
        error = found
    every = all_gather_object((digest, str(source), str(error or "")))
    if error is not None and all(problem for *_, problem in every):
        raise error
    first_digest, first_source, _ = every[0]
    for rank, (other, there, problem) in enumerate(every):
        if problem:
            raise WeightsError(f"rank {rank}: {problem}")
        if other != first_digest:
            raise WeightsError(
                f"rank {rank} has other weights in {there} (SHA-256 {other[:12]}) than rank 0 in "
                f"{first_source} ({first_digest[:12]}); give all ranks the same"
            )
    assert weights is not None
    return weights, digest


def _load(plan: Plan, model: CLIP, weights: Weights) -> list[str]:
    """Load weights into the model of the configuration; the names of what they do not have."""
    source = plan.config.load
    try:
        new = load_into(model, weights, partial=plan.config.load_partial)
    except WeightsError as error:
        if weights.model is None or plan.config.load_arch is not None:
            raise
        raise WeightsError(
            f"{error}; a config without the section model takes that of the weights"
        ) from None
    if model.tokenizer != plan.tokenizer:
        raise WeightsError(
            f"{source}: its tokeniser is not known before its weights are read; convert it first: "
            f"leanclip convert {source} OUT"
        )
    return new


def _choose(plan: Plan, must_resume: bool) -> Chosen | None:
    """The first rank's choice."""
    root = plan.folder / "checkpoints"
    found, skipped = checkpoint.newest(root)
    for reason in skipped:
        log.warning("checkpoint skipped: %s", reason)
    if found is None:
        if must_resume:
            raise ConfigError(
                f"--resume: no checkpoint in {plan.folder}; leave --resume out to begin"
            )
        return None
    progress, digests = checkpoint.progress_of(found), checkpoint.manifest_digests(root)
    old = load_config(plan.folder / "config.yaml")
    is_same_batch = plan.batch_size == progress.batch_size  # split among another number of ranks
    ignored = ("train.batch_size",) if is_same_batch else ()
    before, now = (_with_normalization(one, plan) for one in (old, plan.config))
    if changed := differences(before, now, ignore=FREE_SETTINGS + ignored):
        raise ConfigError(
            f"{plan.folder}: holds a run of another configuration ({_first_three(changed)}); "
            f"choose another --output-dir, or remove that folder"
        )
    if plan.config.load is not None:
        _check_load(plan, plan.config.load, old.load, progress.loaded, must_resume)
    is_sharded = checkpoint.is_sharded_checkpoint(found)
    return Chosen(found, progress, old, is_sharded, digests)


def _with_normalization(config: Config, plan: Plan) -> Config:
    """The configuration with the mean and std that it leaves to the weights."""
    own = {
        "mean": config.data.mean or plan.preprocess.mean,
        "std": config.data.std or plan.preprocess.std,
    }
    return config.model_copy(update={"data": config.data.model_copy(update=own)})


def _check_load(
    plan: Plan, load: str, old_load: str | None, loaded: str | None, must_resume: bool
) -> None:
    """Refuse to resume a run that did not begin with the weights of --load.

    Args:
        plan: of this start.
        load: the weights of --load.
        old_load: those of the run, by name.
        loaded: the digest of the weights that the run began with; "": scratch; None: not recorded.
        must_resume: with --resume the file's name is enough, even if its content changed.
    """
    is_same_name = load == old_load
    try:
        digest = fingerprint(read_weights(load, arch=plan.config.load_arch).tensors)
    except (LeanclipError, OSError) as error:
        if not is_same_name:
            raise
        log.warning("--load cannot be compared with the weights the run began with: %s", error)
        return
    if digest == loaded or (loaded is None and is_same_name):
        return
    if must_resume and is_same_name:
        log.warning("--load %s: not the weights that the run began with; ignored", load)
        return
    began = "from scratch" if loaded == "" else f"with other weights ({old_load or 'unknown'})"
    raise ConfigError(
        f"--load {load}: {plan.folder} holds a run that began {began}; choose another "
        f"--output-dir to start from these weights, or leave --load out to resume that run"
    )


def _contradiction(plan: Plan, chosen: Chosen | None) -> str:
    """What this rank sees in the run's folder that contradicts the first rank's choice.

    An older checkpoint of the run does not: another machine may see an earlier state of the
    folder. Nor does a damaged one.
    """
    root = plan.folder / "checkpoints"
    if rank_and_world_size()[0] == 0:
        return ""
    digests = checkpoint.manifest_digests(root)
    for name, digest in digests.items():  # the newest first
        expected = chosen.digests.get(name) if chosen else None
        is_newer = chosen is None or name > chosen.folder.name
        is_other = digest != expected if expected else _is_of_another_run(root / name, chosen)
        if (is_newer or is_other) and checkpoint.is_intact(root / name):
            if chosen is None:
                return _sees(root / name, digest, None, "")
            first = chosen.folder.with_name(name) if expected and is_other else chosen.folder
            return _sees(root / name, digest, first, chosen.digests[first.name])
    if chosen is not None and chosen.is_sharded and chosen.folder.name not in digests:
        return _sees(None, "", chosen.folder, chosen.digests[chosen.folder.name])
    return ""


def _is_of_another_run(folder: Path, chosen: Chosen | None) -> bool:
    progress = checkpoint.progress_if_any(folder)
    runs = {one.run for one in (progress, chosen and chosen.progress) if one and one.run}
    return len(runs) > 1


def _sees(here: Path | None, digest: str, first: Path | None, first_digest: str) -> str:
    """What this rank sees, and what the first one sees."""

    def describe(folder: Path | None, digest: str) -> str:
        if folder is None:
            return "no checkpoint"
        step = folder.name.removeprefix("step-").lstrip("0")
        return f"{folder} (step {step}, digest {digest[:12]})"

    return (
        f"sees {describe(here, digest)}, where rank 0 sees {describe(first, first_digest)}; have "
        f"all ranks share one output folder, or remove checkpoints of other runs there"
    )


def _check_shared(folder: Path) -> None:
    """Check that all ranks share the folder, into which each writes its shards."""

    def touch() -> Path:
        mark = folder / f".{uuid.uuid4().hex}.part"
        mark.touch()
        return mark

    mark = from_first(touch)
    problem = ""
    if not (folder / mark.name).is_file():
        problem = (
            f"does not see {mark}, which rank 0 has written: train.sharding fsdp needs an output "
            f"folder that all ranks share"
        )
    try:
        _raise_first(problem)
    finally:
        barrier()
        if rank_and_world_size()[0] == 0:
            mark.unlink(missing_ok=True)


def _raise_first(problem: str) -> None:
    """Raise the first problem that a rank has, on all of them."""
    for rank, found in enumerate(all_gather_object(problem)):
        if found:
            raise ConfigError(f"rank {rank} {found}")


def _first_three(changed: Sequence[str]) -> str:
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return "; ".join(changed[:3]) + more


def _digest_classes(dataset: Dataset) -> str:
    sources = dataset.sources if isinstance(dataset, Mixture) else [dataset]
    names = [list(source.classes or ()) for source in sources]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]
