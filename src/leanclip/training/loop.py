"""Training: a plan in, a run's folder out.

    plan -> start (scratch, weights or checkpoint) -> loop -> evaluate -> pictures

The run's folder holds config.yaml, metrics.jsonl, checkpoints/, report.json and pictures.
The same command in the same folder goes on from the newest checkpoint.
"""

import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import zip_longest
from typing import NamedTuple, TypeVar

import torch
from torch import nn
from torch.amp import GradScaler

from leanclip.config.data import DataConfig
from leanclip.config.schema import Config
from leanclip.config.sections import to_plain
from leanclip.config.strict_yaml import dump_yaml
from leanclip.data.loader import Batch, Position, training_batches
from leanclip.data.skipped import Bad, SkipTracker
from leanclip.distributed.collectives import (
    all_gather_object,
    all_reduce_sum,
    barrier,
    from_first,
    is_lost_rank,
    raise_if_any,
    rank_and_world_size,
)
from leanclip.distributed.preemption import STOP_SIGNALS, Preempted, Signals, catch_signals
from leanclip.distributed.wrap_model import full_model, wrap_model
from leanclip.errors import ConfigError, DataError, one_line
from leanclip.evaluation import Report, evaluate
from leanclip.io.files import try_lock, write_text
from leanclip.io.progress import ProgressBar
from leanclip.model import CLIP
from leanclip.training import checkpoint
from leanclip.training.determinism import allow_tf32, only_deterministic
from leanclip.training.early_stopping import by_evaluation, improved, should_stop, update_best
from leanclip.training.feature_cache import FeatureCache, build_feature_cache
from leanclip.training.finetune import Tuning
from leanclip.training.monitor import (
    Clock,
    LogLines,
    NonFiniteTracker,
    format_metrics,
    peak_memory,
    write_status,
)
from leanclip.training.optimizer import build_optimizer, learning_rate
from leanclip.training.plan import Plan
from leanclip.training.start import Chosen, check_same_plan, choose_checkpoint, read_on_all_ranks
from leanclip.training.step import StepResult, train_step
from leanclip.training.tracking import MetricsLog
from leanclip.weights import load_into

log = logging.getLogger("leanclip")


SKIPPED = "skipped.jsonl"  # in the run's folder

T = TypeVar("T")
WriteReport = Callable[[Report, float, int | None], T]


def train(plan: Plan, write_report: WriteReport[T], *, must_resume: bool = False) -> T | None:
    """Train to the end, from the newest checkpoint in the run's folder where there is one.

    Every rank calls this; on the first one `write_report` is called with the last report, the
    seconds of training over all starts, and the step at which an earlier start had finished the
    run (else None). Returns its result; None on other ranks.

    Raises:
        Preempted: a signal asked for it; the checkpoint is written.
        ConfigError: the folder holds a run of another configuration; or `must_resume` and
            there is no checkpoint.
        DataError: more than the allowed share of the data is unreadable.
        WeightsError: the weights to start from do not fit the model.
        OSError: another process trains in the run's folder.
    """
    if rank_and_world_size()[0] > 0:
        raise_if_any(problem="")
        return _train(plan, write_report, must_resume)
    with try_lock(plan.folder / "lock") as is_acquired:
        problem = f"{plan.folder}: another process trains there; choose another --output-dir"
        raise_if_any(problem="" if is_acquired else problem)
        with suppress(OSError):  # the first checkpoint will say what is wrong there
            checkpoint.sweep(plan.folder / "checkpoints")
        return _train(plan, write_report, must_resume)


def _train(plan: Plan, write_report: WriteReport[T], must_resume: bool) -> T | None:
    """As `train`, in a folder that is this run's."""
    allow_tf32(plan.config.tf32)
    check_same_plan(plan)
    chosen = choose_checkpoint(plan, must_resume)
    if chosen:
        plan = _from_there(plan, chosen)
    try:
        return _run(plan, chosen, write_report)
    except (Preempted, SystemExit) as stopped:  # the latter of a signal while it evaluates
        write_status(plan, "preempted", stopped=str(stopped))
        if isinstance(stopped, Preempted):
            barrier()  # an outer launcher may end all ranks with the first that ends
        raise
    except Exception as error:
        is_lost = is_lost_rank(error)
        write_status(plan, "failed", reason="another rank is gone" if is_lost else one_line(error))
        raise


def _run(plan: Plan, chosen: Chosen | None, write_report: WriteReport[T]) -> T | None:
    """From the checkpoint, the weights or scratch to the report."""
    config, rank = plan.config, rank_and_world_size()[0]
    torch.manual_seed(config.seed)
    model = CLIP(**to_plain(config.model)).to(plan.device)
    done = chosen.progress if chosen else _load(plan, model)
    tuning = Tuning(model, config.finetune, done.new)
    towers = wrap_model(model, config.train)
    optimizer = build_optimizer(model, config.optimizer, tuning.factors)
    torch.manual_seed(config.seed + rank)  # what is drawn in training differs by rank
    if chosen:
        folder = plan.folder / "checkpoints" / chosen.folder.name
        done = checkpoint.restore(folder, model, optimizer, tuning)
    barrier()
    metrics, is_finished = None, _is_finished(plan, done)
    if rank == 0:
        plan.folder.mkdir(parents=True, exist_ok=True)
        write_text(plan.folder / "config.yaml", dump_yaml(to_plain(_recorded(config, chosen))))
        after_step = done.step if chosen else -1
        report_to = config.train.report_to
        metrics = MetricsLog(plan.folder, after_step=after_step, report_to=report_to)
    try:
        with only_deterministic(config.train.deterministic):
            if plan.retention is not None and not chosen:  # what there is to forget
                done = replace(done, before=_evaluate(plan, model, tuning, {}).metrics)
                if metrics is not None:
                    metrics.write(0, by_evaluation(done.before))
            frozen = build_feature_cache(
                model, config, plan.dataset, plan.preprocess, plan.folder / "features"
            )
            report, done = _fit(plan, model, towers, optimizer, tuning, done, metrics, frozen)
    finally:
        if metrics is not None:
            metrics.close()
    if rank > 0:
        return None
    result = write_report(report, done.seconds, done.step if is_finished else None)
    write_status(plan, "done", step=done.step)
    return result


def _fit(
    plan: Plan,
    model: CLIP,
    towers: nn.Module,
    optimizer: torch.optim.Optimizer,
    tuning: Tuning,
    done: checkpoint.Progress,
    metrics: MetricsLog | None,
    frozen: FeatureCache,
) -> tuple[Report, checkpoint.Progress]:
    """The loop: from `done` to the last step, with metrics, evaluations and checkpoints."""
    config, report = plan.config, None
    rank = rank_and_world_size()[0]
    path = plan.folder / SKIPPED
    bad = SkipTracker(
        plan.dataset.distinct, config.data.max_bad_fraction, path, must_write=rank == 0
    )
    bad.found = from_first(lambda: bad.found)
    troubles, result = NonFiniteTracker(plan), None
    stream = _stream(plan, done, frozen)
    scaler = GradScaler(plan.device.type) if config.train.precision == "fp16" else None
    if scaler and done.loss_scale:
        scaler.load_state_dict(done.loss_scale)
    often = config.checkpoint.every_epochs, config.checkpoint.every_steps
    clock = Clock(plan, done.samples)
    began = time.perf_counter() - done.seconds
    write_status(plan, "running", step=done.step)
    bar = ProgressBar("training", plan.last_step, completed=done.step, is_silent=rank > 0)
    lines = LogLines(plan, done=done.step, is_silent=rank > 0 or bar.is_shown)
    with catch_signals() as signals, bar:
        for step in range(done.step, plan.last_step):
            if should_stop(plan, done.best):
                log.info("ends at step %d: no gain after the best, %s", step, done.best)
                break
            batch, position = clock.waiting(lambda: next(stream))
            seen = _seen(batch, signals, len(config.data.sources))  # by all ranks
            for reason in bad.add(seen.bad):
                log.warning("skipped: %s", reason)
            rate = _rate(plan, step)
            must_save = seen.must_save or _is_due(step + 1, plan, *often)
            must_log = must_save or _is_due(step + 1, plan, None, config.train.log_every)
            if seen.samples:
                result = train_step(
                    model,
                    optimizer,
                    frozen.replace(batch),
                    plan.preprocess,
                    rate=rate,
                    settings=config.train,
                    kind=plan.loss,
                    max_gradient_norm=config.optimizer.max_gradient_norm,
                    towers=towers,
                    must_measure=must_log,
                    scaler=scaler,
                )
                tuning.after_step(result.is_finite)
                if not frozen.is_used:
                    clock.work.add(len(batch), batch.tokens.shape[1])
                troubles.note(step + 1, result.is_finite, batch)
            done = _after_step(done, plan, seen, position, time.perf_counter() - began)
            if must_log:
                troubles.raise_if_many()  # waits for the device
                line = _line(plan, done, result, rate, model.logit_scale, scaler)
                line |= {"train/skipped": len(bad.found), "train/skipped_steps": troubles.count}
                line |= clock.rates(done.samples)
                if metrics is not None:
                    metrics.write(done.step, line)
                bar.note(format_metrics(line))
                lines.note(done.step, line)
            bar.update(done.step)
            measures = plan.tasks or plan.retention
            if measures and _is_due(done.step, plan, config.evaluate.every_epochs):
                report = _evaluate(plan, model, tuning, done.before)
                if metrics is not None:
                    metrics.write(done.step, by_evaluation(report.metrics))
                done = replace(done, best=update_best(plan, done.best, report.metrics, done.step))
                must_save = must_save or improved(plan, done.best)
            if must_save:
                state = scaler.state_dict() if scaler else None
                _save(plan, replace(done, loss_scale=state), model, optimizer, tuning)
            if seen.stop:
                raise Preempted(seen.stop)
    clock.log_waiting()
    if done.samples == 0:
        raise DataError(f"{plan.config.data.root}: not one sample could be used: {bad.summary()}")
    # A run that is taken up again after its last step has nothing left but to be measured.
    return report or _evaluate(plan, model, tuning, done.before), done


def _stream(
    plan: Plan, done: checkpoint.Progress, frozen: FeatureCache
) -> Iterator[tuple[Batch, Position]]:
    """This rank's part of the batches after `done`."""
    config, (rank, world_size) = plan.config, rank_and_world_size()
    return training_batches(
        plan.dataset,
        config.data,
        preprocess=plan.preprocess,
        context_length=config.model.context_length,
        truncate=config.train.truncate_captions,
        batch_size=plan.batch_size,
        seed=config.seed,
        start=Position(done.epoch, done.sample),
        rank=rank,
        world_size=world_size,
        undecoded=frozen.undecoded,
    )


def _line(
    plan: Plan,
    done: checkpoint.Progress,
    result: StepResult | None,
    rate: float,
    logit_scale: torch.Tensor,
    scaler: GradScaler | None,
) -> dict[str, float]:
    """What metrics.jsonl says of a step; this waits for the device."""
    line = {
        "train/loss": result.loss.item() if result else 0.0,
        "train/gradient_norm": result.gradient_norm.item() if result else 0.0,
        "train/lr": rate,
        "train/logit_scale": logit_scale.exp().item(),
        "train/epoch": (done.step - plan.offset) / plan.steps_per_epoch,
        "train/samples": done.samples,
        **_by_source(plan.config.data, done.sources),
        "train/peak_memory_gb": peak_memory(plan.device),
    }
    for name, norm in (result.norms if result else {}).items():
        line[f"train/{name}"] = norm.item()
    if scaler:
        line["train/loss_scale"] = scaler.get_scale()
    return line


def _evaluate(plan: Plan, model: CLIP, tuning: Tuning, before: dict[str, float]) -> Report:
    """The report, to which every rank adds its part; all have the figures, the first has all."""
    model = full_model(model)
    with tuning.averaged():
        return evaluate(model, plan.tasks, plan.preprocess, retention=plan.retention, before=before)


def _save(
    plan: Plan,
    done: checkpoint.Progress,
    model: CLIP,
    optimizer: torch.optim.Optimizer,
    tuning: Tuning,
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
            tuning=tuning,
        )
    except OSError as error:
        if done.step == plan.last_step:
            raise
        log.error(
            "no checkpoint at step %d: %s; those before it are as they were", done.step, error
        )
        return
    write_status(plan, "running", step=done.step)


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
    asked = [signals.stop == number for number in STOP_SIGNALS]
    counts = [len(batch), len(batch.bad), signals.save, *asked, *by_source]
    samples, bad, save, *rest = all_reduce_sum([int(count) for count in counts])
    signals.save = False
    stop = next((n for n, is_asked in zip(STOP_SIGNALS, rest, strict=False) if is_asked), 0)
    every_bad = [one for part in all_gather_object(batch.bad) for one in part] if bad else []
    return _Seen(samples, rest[len(STOP_SIGNALS) :], every_bad, stop, bool(save or stop))


def _after_step(
    done: checkpoint.Progress, plan: Plan, seen: _Seen, position: Position, seconds: float
) -> checkpoint.Progress:
    """How far the run has come with one step more, which saw this and ended there."""
    sources = [a + b for a, b in zip_longest(done.sources, seen.sources, fillvalue=0)]
    return replace(
        done,
        step=done.step + 1,
        epoch=position.epoch,
        sample=position.sample,
        samples=done.samples + seen.samples,
        sources=sources,
        seconds=seconds,
        dataset_size=len(plan.dataset),
        batch_size=plan.batch_size,
    )


def _recorded(config: Config, chosen: Chosen | None) -> Config:
    """The settings to write: they name the weights that the run began with, once and for all."""
    if chosen is None or config.load is not None:
        return config
    names = ("load", "load_arch", "load_partial")
    return config.model_copy(update={name: getattr(chosen.config, name) for name in names})


def _from_there(plan: Plan, chosen: Chosen) -> Plan:
    """The plan from a checkpoint on: its steps are counted on, in batches of this run's size."""
    done = chosen.progress
    left = max(0, len(plan.dataset) - done.sample) // plan.batch_size  # whole ones of this epoch
    here = (done.epoch + 1) * plan.steps_per_epoch - left
    plan = replace(plan, offset=done.step - here)
    if done.dataset_size not in (0, len(plan.dataset)):
        log.warning(
            "the data has %d samples an epoch, and had %d when the checkpoint was written: the "
            "rest of this epoch is of another order, and may repeat or leave out samples",
            *(len(plan.dataset), done.dataset_size),
        )
    elif done.batch_size not in (0, plan.batch_size):
        log.info(
            "the global batch was %d and is %d now: %d steps are left",
            *(done.batch_size, plan.batch_size, plan.last_step - done.step),
        )
    log.info("going on from %s, step %d of %d", chosen.folder, done.step, plan.last_step)
    return plan


def _is_finished(plan: Plan, done: checkpoint.Progress) -> bool:
    return done.step >= plan.last_step or should_stop(plan, done.best)


def _rate(plan: Plan, step: int) -> float:
    """The learning rate of a step, by its place in the data."""
    return learning_rate(
        step - plan.offset, peak=plan.peak_learning_rate, warmup=plan.warmup, steps=plan.steps
    )


def _load(plan: Plan, model: CLIP) -> checkpoint.Progress:
    """The beginning of a run: the model has the weights of `config.load`, where there are."""
    config, new, digest = plan.config, [], ""
    if config.load is not None:
        weights, digest = read_on_all_ranks(config.load, config.load_arch)
        new = load_into(model, weights, partial=config.load_partial)
        own = weights.preprocess
        if own and (own.mean, own.std) != (plan.preprocess.mean, plan.preprocess.std):
            log.warning(
                "%s: was trained with mean %s, std %s; this run has data.mean %s, data.std %s",
                *(config.load, own.mean, own.std, plan.preprocess.mean, plan.preprocess.std),
            )
        log.info("starting from the weights of %s", config.load)
    for name in ("lock_image", "lock_text", "lora_rank"):
        if config.load is None and getattr(config.finetune, name) is not None:
            raise ConfigError(f"finetune.{name}: keeps loaded weights as they are; give --load")
    if rank_and_world_size()[0] == 0:
        (plan.folder / SKIPPED).unlink(missing_ok=True)  # of a run that left no checkpoint
    run = from_first(lambda: uuid.uuid4().hex)
    return checkpoint.Progress(0, 0, 0, 0, [], 0.0, new=new, loaded=digest, run=run)


def _is_due(
    step: int, plan: Plan, every_epochs: int | None, every_steps: int | None = None
) -> bool:
    """Whether something is due after this step: at the end, every so many epochs or steps."""
    here = step - plan.offset
    by_epoch = every_epochs is not None and here % (every_epochs * plan.steps_per_epoch) == 0
    by_step = every_steps is not None and step % every_steps == 0
    return step == plan.last_step or by_epoch or by_step


def _by_source(data: DataConfig, counts: list[int]) -> dict[str, float]:
    """`train/samples/ROOT` of each source of a mixture."""
    return {
        f"train/samples/{source.root}": counts[i] if i < len(counts) else 0
        for i, source in enumerate(data.sources)
    }
