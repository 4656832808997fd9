"""Training: a plan in, a run's folder out.

    plan -> start (scratch, weights or checkpoint) -> loop -> evaluate -> pictures

The run's folder holds config.yaml, metrics.jsonl, checkpoints/, evaluation.json and pictures.
The same command in the same folder goes on from the newest checkpoint.
"""

import json
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from leanclip import checkpoint
from leanclip.config import Config, DataConfig
from leanclip.data.loader import Batch, Position, training_batches
from leanclip.data.skipped import Bad, BadSamples
from leanclip.distributed import barrier, everyones, rank_and_world_size, total
from leanclip.errors import ConfigError, LeanclipError
from leanclip.evaluate import Report, evaluate, open_tasks
from leanclip.model import CLIP
from leanclip.optim import build_optimizer, learning_rate
from leanclip.plan import Plan, model_preprocess
from leanclip.plots import run_pictures
from leanclip.settings import differences, parse, to_plain
from leanclip.step import over_ranks, train_step
from leanclip.stopping import Signals, Stopped
from leanclip.strict_yaml import dump_yaml, load_yaml
from leanclip.tracking import MetricsLog, ProgressBar, write_text
from leanclip.weights import load_into, read_weights

T = TypeVar("T")
SKIPPED = "skipped.jsonl"  # in the run's folder
STOPPING = (signal.SIGTERM, signal.SIGINT)
MUCH_WAITING = 0.2  # share of the time from which waiting for data is worth a word
log = logging.getLogger("leanclip")

# Settings, or groups, that may differ between two starts of a run: they do not change its weights.
FREE_SETTINGS = (
    "output_dir",
    "device",
    "load",
    "load_arch",
    "load_partial",
    "data.workers",
    "data.cache_gigabytes",
    "data.max_bad_share",
    "train.log_every",
    "evaluate",
    "checkpoint",
)


@dataclass(frozen=True)
class Outcome:
    """What a run, or an evaluation of one, came to."""

    folder: Path
    report: Report
    pictures: list[Path]
    seconds: float  # of training, over all starts


def train(plan: Plan, *, must_resume: bool = False) -> Outcome | None:
    """Train to the end, from the newest checkpoint in the run's folder where there is one.

    Every rank calls this; the first one gives the outcome.

    Raises:
        Stopped: a signal asked for it; the checkpoint is written.
        ConfigError: the folder holds a run of another configuration; or `must_resume` and
            there is no checkpoint.
        DataError: more than the allowed share of the data is unreadable.
        WeightsError: the weights to start from do not fit the model.
    """
    config, rank = plan.config, rank_and_world_size()[0]
    torch.manual_seed(config.seed)
    model = CLIP(**to_plain(config.model)).to(plan.device)
    optimizer = build_optimizer(model, config.optimizer)
    torch.manual_seed(config.seed + rank)  # what is drawn in training differs by rank
    done = _start(plan, model, optimizer, must_resume)
    barrier()
    if rank == 0:
        plan.folder.mkdir(parents=True, exist_ok=True)
        write_text(plan.folder / "config.yaml", dump_yaml(to_plain(config)))
    metrics = MetricsLog(plan.folder, after_step=done.step) if rank == 0 else None
    try:
        report, done = _fit(plan, model, optimizer, done, metrics)
    except Stopped as stopped:
        _write_status(plan, "preempted", stopped=str(stopped))
        raise
    except LeanclipError as error:
        _write_status(plan, "failed", reason=str(error))
        raise
    finally:
        if metrics is not None:
            metrics.close()
    if rank > 0:
        return None
    _write_status(plan, "done", step=done.step)
    return _finish(plan.folder, report, done.seconds)


def evaluate_only(config: Config, device: torch.device, source: str | None = None) -> Outcome:
    """Measure weights without training: of `source`, else of the run's folder, else `config.load`.

    Raises:
        ConfigError: the configuration names nothing to evaluate.
        WeightsError: there are no weights, or they do not fit the model.
    """
    tasks = open_tasks(config)
    if not tasks:
        raise ConfigError("nothing to evaluate: set evaluate.zero_shot or evaluate.retrieval")
    folder = Path(config.output_dir)
    model = CLIP(**to_plain(config.model))
    if source is None:
        source = str(folder) if any(folder.glob("checkpoints/step-*")) else config.load
    weights = read_weights(source or folder, arch=config.load_arch)
    load_into(model, weights, partial=config.load_partial)
    return _finish(folder, evaluate(model.to(device), tasks, model_preprocess(config)), 0.0)


def summary(outcome: Outcome) -> str:
    """A run in plain words: what it learned, where everything is, what to type next."""
    folder, report = outcome.folder, outcome.report
    lines = []
    if outcome.seconds:
        lines.append(f"Trained for {outcome.seconds / 60:.1f} minutes.")
    lines += report.sentences
    skipped = BadSamples(0, 1, folder / SKIPPED)
    if skipped.found:
        lines.append(f"Training skipped {skipped.summary()}: see {skipped.path}")
    if report.bad:
        lines.append(f"{len(report.bad)} samples could not be used: see {folder}/evaluation.json")
    if not report.sentences:
        lines.append("Nothing was evaluated: set evaluate.zero_shot or evaluate.retrieval.")
    lines.append(f"Folder:   {folder}")
    lines += [f"Picture:  {picture}" for picture in outcome.pictures]
    if (folder / "config.yaml").is_file():
        lines += [
            f"Next:     leanclip eval --model {folder}",
            f"          leanclip train -c YOUR.yaml --load {folder}     (fine-tune it)",
        ]
    return "\n".join(lines)


def _fit(
    plan: Plan,
    model: CLIP,
    optimizer: torch.optim.Optimizer,
    done: checkpoint.Progress,
    metrics: MetricsLog | None,
) -> tuple[Report, checkpoint.Progress]:
    """The loop: from `done` to the last step, with metrics, evaluations and checkpoints."""
    config, report = plan.config, None
    rank, world_size = rank_and_world_size()
    towers = over_ranks(model)
    path = plan.folder / SKIPPED
    bad = BadSamples(len(plan.dataset), config.data.max_bad_share, path, must_write=rank == 0)
    troubles, result = _Troubles(plan), None
    stream = training_batches(
        plan.dataset,
        config.data,
        resolution=config.model.image_resolution,
        context_length=config.model.context_length,
        truncate=config.train.truncate_captions,
        batch_size=plan.batch_size,
        seed=config.seed,
        start=Position(done.epoch, done.sample),
        rank=rank,
        world_size=world_size,
    )
    clock = _Clock(done.samples)
    began = time.perf_counter() - done.seconds
    _write_status(plan, "running", step=done.step)
    bar = ProgressBar("training", plan.steps, completed=done.step, is_silent=rank > 0)
    with Signals() as signals, bar:
        for step in range(done.step, plan.steps):
            batch, position = clock.waiting(lambda: next(stream))
            seen = _seen(batch, signals, len(config.data.sources))  # by all ranks
            for reason in bad.add(seen.bad):
                log.warning("skipped: %s", reason)
            rate = learning_rate(step, peak=plan.peak_rate, warmup=plan.warmup, steps=plan.steps)
            if seen.samples:
                result = train_step(
                    model,
                    optimizer,
                    batch,
                    plan.preprocess,
                    rate=rate,
                    settings=config.train,
                    kind=plan.loss,
                    max_gradient_norm=config.optimizer.max_gradient_norm,
                    towers=towers,
                )
                troubles.note(step + 1, result.is_finite, batch)
            done = checkpoint.Progress(
                step + 1,
                *position,
                done.samples + seen.samples,
                _added(done.sources, seen.sources),
                time.perf_counter() - began,
            )
            must_save = seen.must_save or _is_due(
                done.step,
                plan,
                every_epochs=config.checkpoint.every_epochs,
                every_steps=config.checkpoint.every_steps,
            )
            if must_save or _is_due(done.step, plan, every_steps=config.train.log_every):
                troubles.raise_if_many()  # waits for the device
                line = {
                    "train/loss": result.loss.item() if result else 0.0,
                    "train/gradient_norm": result.gradient_norm.item() if result else 0.0,
                    "train/lr": rate,
                    "train/logit_scale": model.logit_scale.exp().item(),
                    "train/epoch": done.step / plan.steps_per_epoch,
                    "train/samples": done.samples,
                    "train/skipped": len(bad.found),
                    "train/skipped_steps": troubles.count,
                    **_by_source(config.data, done.sources),
                    **clock.rates(done.samples),
                }
                if metrics is not None:
                    metrics.write(done.step, line)
                bar.note(
                    f"loss {line['train/loss']:.3f}  "
                    f"{line['train/samples_per_second']:.0f} images/s  "
                    f"{line['train/data_wait_share']:.0%} waiting for data"
                )
            bar.update(done.step)
            if plan.tasks and _is_due(done.step, plan, every_epochs=config.evaluate.every_epochs):
                report = _evaluate(plan, model)
                if metrics is not None:
                    metrics.write(done.step, {f"val/{k}": v for k, v in report.metrics.items()})
            if must_save:
                _save(plan, done, model, optimizer)
            if seen.stop:
                raise Stopped(seen.stop)
    clock.log_waiting()
    # A run that is taken up again after its last step has nothing left but to be measured.
    return report or _evaluate(plan, model), done


def _evaluate(plan: Plan, model: CLIP) -> Report:
    """The report of the first rank; the others wait."""
    is_first = rank_and_world_size()[0] == 0
    report = evaluate(model, plan.tasks, plan.preprocess) if is_first else Report()
    barrier()
    return report


def _save(
    plan: Plan, done: checkpoint.Progress, model: CLIP, optimizer: torch.optim.Optimizer
) -> None:
    """Write a checkpoint; one that cannot be written ends the run only after its last step."""
    try:
        checkpoint.save(
            plan.folder / "checkpoints",
            done,
            model,
            optimizer,
            plan.preprocess,
            keep=plan.config.checkpoint.keep,
        )
    except OSError as error:
        if done.step == plan.steps:
            raise
        log.error(
            "no checkpoint at step %d: %s; those before it are as they were", done.step, error
        )
        return
    _write_status(plan, "running", step=done.step)


def _write_status(plan: Plan, state: str, **facts: str | int) -> None:
    """Write status.json into the run's folder, for schedulers."""
    if rank_and_world_size()[0] == 0 and plan.folder.is_dir():
        text = json.dumps({"state": state, "steps": plan.steps, "time": time.time(), **facts})
        write_text(plan.folder / "status.json", text + "\n")


class _Seen(NamedTuple):
    """What all ranks have in a step, and what signals asked of any of them."""

    samples: int
    sources: list[int]  # samples by source, of a mixture
    bad: list[Bad]
    stop: int  # a signal's number, or 0
    must_save: bool


def _seen(batch: Batch, signals: Signals, sources: int) -> _Seen:
    """Put together what each rank has; the one word that ranks change beside the gradients."""
    by_source = torch.bincount(batch.sources, minlength=sources).tolist() if sources else []
    asked = [signals.stop == number for number in STOPPING]
    counts = [len(batch), len(batch.bad), signals.save, *asked, *by_source]
    samples, bad, save, *rest = total([int(count) for count in counts])
    signals.save = False
    stop = next((n for n, is_asked in zip(STOPPING, rest, strict=False) if is_asked), 0)
    every_bad = [one for part in everyones(batch.bad) for one in part] if bad else []
    return _Seen(samples, rest[len(STOPPING) :], every_bad, stop, bool(save or stop))


def _start(
    plan: Plan, model: CLIP, optimizer: torch.optim.Optimizer, must_resume: bool
) -> checkpoint.Progress:
    """Bring the model to where it starts: a checkpoint of this folder, weights, or scratch."""
    config = plan.config
    found, skipped = checkpoint.newest(plan.folder / "checkpoints")
    for reason in skipped:
        log.warning("checkpoint skipped: %s", reason)
    if found is not None:
        _same_run(plan)
        done = checkpoint.restore(found, model, optimizer)
        here = done.epoch * plan.steps_per_epoch + done.sample // plan.batch_size
        if here != done.step:
            log.info("the batch was of another size then: step %d is step %d now", done.step, here)
            done = replace(done, step=here)
        more = " (so --load is not used)" if config.load else ""
        log.info("going on from %s, step %d of %d%s", found, done.step, plan.steps, more)
        return done
    if must_resume:
        raise ConfigError(f"--resume: no checkpoint in {plan.folder}; leave --resume out to begin")
    if config.load is not None:
        weights = read_weights(config.load, arch=config.load_arch)
        load_into(model, weights, partial=config.load_partial)
        own = weights.preprocess
        if own and (own.mean, own.std) != (plan.preprocess.mean, plan.preprocess.std):
            log.warning(
                "%s: was trained with mean %s, std %s; this run has data.mean %s, data.std %s",
                *(config.load, own.mean, own.std, plan.preprocess.mean, plan.preprocess.std),
            )
        log.info("starting from the weights of %s", config.load)
    if rank_and_world_size()[0] == 0:
        (plan.folder / SKIPPED).unlink(missing_ok=True)  # of a run that left no checkpoint
    return checkpoint.Progress(0, 0, 0, 0, [], 0.0)


def _same_run(plan: Plan) -> None:
    """Refuse to go on in a folder whose run had other settings."""
    path = plan.folder / "config.yaml"
    old = parse(Config, load_yaml(path.read_text("utf-8"), where=str(path)), where=str(path))
    changed = differences(old, plan.config, ignore=FREE_SETTINGS)
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ConfigError(
            f"{plan.folder}: holds a run of another configuration "
            f"({'; '.join(changed[:3])}{more}); choose another --output-dir, or remove that folder"
        )


def _finish(folder: Path, report: Report, seconds: float) -> Outcome:
    """Write evaluation.json and the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    report.write(folder)
    return Outcome(folder, report, run_pictures(folder, report), seconds)


def _is_due(
    step: int, plan: Plan, *, every_epochs: int | None = None, every_steps: int | None = None
) -> bool:
    """Whether something is due after this step: at the end, every so many epochs or steps."""
    by_epoch = every_epochs is not None and step % (every_epochs * plan.steps_per_epoch) == 0
    by_step = every_steps is not None and step % every_steps == 0
    return step == plan.steps or by_epoch or by_step


def _added(before: list[int], more: list[int]) -> list[int]:
    return [a + b for a, b in zip_longest(before, more, fillvalue=0)]


def _by_source(data: DataConfig, counts: list[int]) -> dict[str, float]:
    """`train/samples/ROOT` of each source of a mixture."""
    return {
        f"train/samples/{source.root}": counts[i] if i < len(counts) else 0
        for i, source in enumerate(data.sources)
    }


class _Troubles:
    """Steps that were left out because their loss or gradients were not finite."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.count, self.in_a_row = plan, 0, 0
        self._pending: list[tuple[int, torch.Tensor, list[int]]] = []

    def note(self, step: int, is_finite: torch.Tensor, batch: Batch) -> None:
        """Keep a step's flag, which is still on the device, with its samples."""
        self._pending.append((step, is_finite, batch.indices.tolist()))

    def raise_if_many(self) -> None:
        """Look at the flags since the last time.

        Raises:
            LeanclipError: `train.max_skipped_steps` in a row were not finite.
        """
        for step, is_finite, indices in self._pending:
            self.in_a_row = 0 if is_finite else self.in_a_row + 1
            if is_finite:
                continue
            self.count += 1
            names = [self.plan.dataset.name(index) for index in indices if index >= 0]
            log.warning(
                "step %d left out: its loss or gradients are not finite; its samples: %s",
                *(step, ", ".join(names)),
            )
            allowed = self.plan.config.train.max_skipped_steps
            if self.in_a_row >= (allowed if step < self.plan.steps else min(allowed, 3)):
                raise LeanclipError(
                    f"the loss or its gradients were not finite in {self.in_a_row} steps in a row, "
                    f"to step {step}; lower optimizer.learning_rate, lengthen optimizer.warmup or "
                    f"set optimizer.max_gradient_norm, and start again"
                )
        self._pending.clear()


class _Clock:
    """Time since the last line of metrics: samples per second, share of it waiting for data."""

    def __init__(self, samples: int) -> None:
        self.samples, self.began, self.waited = samples, time.perf_counter(), 0.0
        self.first_began, self.waited_before = self.began, 0.0

    def waiting(self, get: Callable[[], T]) -> T:
        """Call `get`, counting its time as waiting."""
        began = time.perf_counter()
        result = get()
        self.waited += time.perf_counter() - began
        return result

    def rates(self, samples: int) -> dict[str, float]:
        """The figures since the last call, which begins anew."""
        seconds = time.perf_counter() - self.began
        figures = {
            "train/samples_per_second": (samples - self.samples) / seconds,
            "train/data_wait_share": self.waited / seconds,
        }
        self.waited_before += self.waited
        self.samples, self.began, self.waited = samples, time.perf_counter(), 0.0
        return figures

    def log_waiting(self) -> None:
        """Say how much of the whole time went by waiting for data, where it is much."""
        seconds = time.perf_counter() - self.first_began
        share = (self.waited_before + self.waited) / seconds
        if share > MUCH_WAITING and seconds > 10:
            log.info(
                "%.0f%% of the time was spent waiting for data: docs/data.md, Speed, says "
                "what helps",
                100 * share,
            )
