"""What a run starts from: a checkpoint, weights, or scratch; the same on every rank.

    plan, weights and checkpoints of every rank -> compared with the first rank's -> Chosen

The first rank chooses. The others only look whether what they see contradicts the choice; the
checkpoint itself reaches them from the first rank, so the run's folder may be on its disk alone.
Every error is raised on every rank, with the number of the rank that differs.
"""

import hashlib
import json
import logging
import uuid
from functools import partial
from pathlib import Path
from typing import NamedTuple

from leanclip.config.schema import Config, load_config
from leanclip.config.sections import differences
from leanclip.data import Dataset
from leanclip.data.formats.mixture import Mixture
from leanclip.distributed.collectives import (
    all_gather_object,
    barrier,
    from_first,
    rank_and_world_size,
)
from leanclip.errors import ConfigError, LeanclipError, WeightsError
from leanclip.training import checkpoint
from leanclip.training.plan import Plan
from leanclip.weights import Weights, fingerprint, read_weights
from leanclip.weights.read import Architecture

log = logging.getLogger("leanclip")

# Settings, or groups, that may differ between two starts of a run: they do not change its weights,
# but by rounding in the case of micro-batches.
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
# Those that may differ between the ranks of a run. Of `load` the weights are compared.
FREE_AMONG_RANKS = (
    "output_dir",
    "device",
    "load",
    "data.workers",
    "data.cache_gigabytes",
    "train.report_to",
)


class Chosen(NamedTuple):
    """The checkpoint that a run goes on from."""

    folder: Path  # on the first rank
    digest: str  # of its manifest, which has the digest of every file
    progress: checkpoint.Progress
    config: Config  # of the last start
    is_sharded: bool
    digests: dict[str, str]  # of all checkpoints there, by their names


def check_same_plan(plan: Plan) -> None:
    """Compare configuration, size of the data, classes and steps on all ranks.

    Raises:
        ConfigError: a rank has others than the first.
    """
    data = {"data": plan.dataset}
    data |= {f"evaluate.{task.name}": task.dataset for task in plan.tasks}
    data |= {"evaluate.retention": plan.retention.dataset} if plan.retention else {}
    facts: dict[str, object] = {f"samples of {name}": len(one) for name, one in data.items()}
    facts |= {f"classes of {name} (digest)": _classes(one) for name, one in data.items()}
    facts |= {
        "preprocessing": str(plan.preprocess),
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
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ConfigError(
                f"rank {rank} (there) differs from rank 0 (here): {'; '.join(changed[:3])}{more}; "
                f"start all ranks with the same command and the same data"
            )


def choose_checkpoint(plan: Plan, must_resume: bool) -> Chosen | None:
    """The newest checkpoint of the run's folder that is whole, as the first rank sees it.

    Raises:
        ConfigError: the folder holds a run of another configuration or of other weights; or
            another rank sees another checkpoint there; or `must_resume` and there is none.
    """
    chosen = from_first(partial(_choose, plan, must_resume))
    if plan.config.train.sharding == "fsdp" and rank_and_world_size()[1] > 1:
        _check_shared(plan.folder)
    _raise_first(_contradiction(plan, chosen))
    return chosen


def read_on_all_ranks(source: str | Path, arch: Architecture | None = None) -> tuple[Weights, str]:
    """Weights that each rank reads for itself, and their digest, which is the same on all.

    Raises:
        WeightsError: they cannot be read, or those of a rank are not the first one's.
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
    old = _same_run(plan, progress.batch_size)
    _check_load(plan, old, progress.loaded, must_resume)
    is_sharded = checkpoint.is_in_shards(found)
    return Chosen(found, digests[found.name], progress, old, is_sharded, digests)


def _same_run(plan: Plan, batch_size: int) -> Config:
    """The settings of the run in the folder; `batch_size` is its global one.

    Raises:
        ConfigError: they are not those of the plan.
    """
    old = load_config(plan.folder / "config.yaml")
    split = ("train.batch_size",) if plan.batch_size == batch_size else ()  # among other ranks
    changed = differences(old, plan.config, ignore=FREE_SETTINGS + split)
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ConfigError(
            f"{plan.folder}: holds a run of another configuration "
            f"({'; '.join(changed[:3])}{more}); choose another --output-dir, or remove that folder"
        )
    return old


def _check_load(plan: Plan, old: Config, loaded: str | None, must_resume: bool) -> None:
    """Refuse to go on with a run that did not begin with the weights of --load.

    Args:
        plan: with these weights.
        old: the settings of the run.
        loaded: the digest of what the run began with; "": scratch; None: an older leanclip did not
            record it.
        must_resume: the run is what is wanted, whatever has become of the file of weights.
    """
    load = plan.config.load
    if load is None:
        return
    is_same_name = load == old.load
    try:
        digest = fingerprint(read_weights(load, arch=plan.config.load_arch).tensors)
    except (LeanclipError, OSError) as error:
        if not is_same_name:
            raise
        log.warning("--load cannot be compared with what the run began with: %s", error)
        return
    if digest == loaded or (loaded is None and is_same_name):
        return
    if must_resume and is_same_name:
        log.warning("--load %s: are not the weights any more that the run began with", load)
        return
    began = "from scratch" if loaded == "" else f"with other weights ({old.load or 'unknown'})"
    raise ConfigError(
        f"--load {load}: {plan.folder} holds a run that began {began}; to start from these "
        f"weights choose another --output-dir, to go on with that run leave --load out"
    )


def _contradiction(plan: Plan, chosen: Chosen | None) -> str:
    """What this rank sees in the run's folder that the first one's choice cannot stand beside.

    An older checkpoint of the run does not: another machine may show an earlier state of the
    folder. Nor does one that is damaged.
    """
    root = plan.folder / "checkpoints"
    if rank_and_world_size()[0] == 0:
        return ""
    digests = checkpoint.manifest_digests(root)
    for name, digest in digests.items():  # the newest first
        expected = chosen.digests.get(name) if chosen else None
        is_newer = chosen is None or name > chosen.folder.name
        is_other = digest != expected if expected else _is_of_another_run(root / name, chosen)
        if (is_newer or is_other) and checkpoint.is_whole(root / name):
            if chosen is None:
                return _sees(root / name, digest, None, "")
            first = chosen.folder.with_name(name) if expected and is_other else chosen.folder
            return _sees(root / name, digest, first, chosen.digests[first.name])
    if chosen is not None and chosen.is_sharded and chosen.folder.name not in digests:
        return _sees(None, "", chosen.folder, chosen.digest)
    return ""


def _is_of_another_run(folder: Path, chosen: Chosen | None) -> bool:
    progress = checkpoint.progress_if_any(folder)
    runs = {one.run for one in (progress, chosen and chosen.progress) if one and one.run}
    return len(runs) > 1


def _sees(here: Path | None, digest: str, first: Path | None, first_digest: str) -> str:
    """The sentence about a checkpoint that this rank sees, and what the first one sees."""

    def words(folder: Path | None, digest: str) -> str:
        if folder is None:
            return "no checkpoint"
        step = folder.name.removeprefix("step-").lstrip("0")
        return f"{folder} (step {step}, digest {digest[:12]})"

    return (
        f"sees {words(here, digest)}, where rank 0 sees {words(first, first_digest)}; have all "
        f"ranks share one output folder, or remove there what is not of this run"
    )


def _check_shared(folder: Path) -> None:
    """See that all ranks have the folder in common, into which each writes its shards."""

    def leave_a_mark() -> Path:
        mark = folder / f".{uuid.uuid4().hex}.part"
        mark.touch()
        return mark

    mark = from_first(leave_a_mark)
    own = folder / mark.name
    problem = "" if own.is_file() else f"does not see {mark}, which rank 0 has written"
    try:
        _raise_first(
            problem
            and f"{problem}: train.sharding fsdp needs an output folder that all ranks share"
        )
    finally:
        barrier()
        if rank_and_world_size()[0] == 0:
            mark.unlink(missing_ok=True)


def _raise_first(problem: str) -> None:
    """Raise the first problem that a rank has, on all of them."""
    for rank, found in enumerate(all_gather_object(problem)):
        if found:
            raise ConfigError(f"rank {rank} {found}")


def _classes(dataset: Dataset) -> str:
    sources = dataset.sources if isinstance(dataset, Mixture) else [dataset]
    names = [list(source.classes or ()) for source in sources]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]
