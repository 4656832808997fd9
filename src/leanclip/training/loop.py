"""Training: a plan in, a run's folder out.

    plan -> start (scratch, weights or checkpoint) -> loop over steps -> evaluation -> report

The run's folder holds config.yaml, metrics.jsonl, checkpoints/, report.json and pictures.
The same command in the same folder resumes from the newest checkpoint.
"""

import logging
import time
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import NamedTuple, TypeVar

import torch
from torch import nn
from torch.amp import GradScaler

from leanclip.config.sections import to_plain
from leanclip.config.strict_yaml import dump_yaml
from leanclip.data.batch import Batch, Position
from leanclip.data.loader import training_batches
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
from leanclip.errors import DataError, one_line
from leanclip.evaluation import Report, evaluate
from leanclip.io.files import try_lock, write_text
from leanclip.model import CLIP
from leanclip.training import checkpoint
from leanclip.training.determinism import allow_tf32, only_deterministic
from leanclip.training.feature_cache import FeatureCache, build_feature_cache
from leanclip.training.finetune import Tuning
from leanclip.training.monitor import Monitor, write_status
from leanclip.training.optimizer import build_optimizer
from leanclip.training.plan import Plan
from leanclip.training.schedule import (
    improved,
    is_due,
    learning_rate_at,
    should_stop,
    update_best,
)
from leanclip.training.start import (
    Chosen,
    check_same_plan,
    choose_checkpoint,
    config_to_record,
    load_initial_weights,
    plan_from,
)
from leanclip.training.step import StepResult, train_step
from leanclip.training.tracking import MetricsLog

log = logging.getLogger("leanclip")

SKIPPED = "skipped.jsonl"  # in the run's folder

T = TypeVar("T")
WriteReport = Callable[[Report, float, int | None], T]


def train(plan: Plan, write_report: WriteReport[T], *, must_resume: bool = False) -> T | None:
    """Train to the end, from the newest checkpoint in the run's folder if there is one.

    Every rank calls this; on the first one `write_report` is called with the last report, the
    seconds of training over all starts, and the step at which an earlier start had finished the
    run (else None). Returns its result; None on other ranks.

    Raises:
        Preempted: a signal stopped the run; the checkpoint is written.
        ConfigError: the folder holds a run of another configuration; or `must_resume` and
            there is no checkpoint.
        DataError: more than the allowed fraction of the data is unreadable.
        WeightsError: the weights to start from do not fit the model.
        OSError: another process trains in the run's folder.
    """
    if rank_and_world_size()[0] > 0:
        raise_if_any(problem="")
        return _train(plan, write_report, must_resume)
    with try_lock(plan.folder / "lock") as is_acquired:
        problem = f"{plan.folder}: another process trains there; choose another --output-dir"
        raise_if_any(problem="" if is_acquired else problem)
        with suppress(OSError):  # the first checkpoint will report it
            checkpoint.sweep(plan.folder / "checkpoints")
        return _train(plan, write_report, must_resume)


def _train(plan: Plan, write_report: WriteReport[T], must_resume: bool) -> T | None:
    """As `train`, in a folder that this process has locked."""
    allow_tf32(plan.config.tf32)
    check_same_plan(plan)
    chosen = choose_checkpoint(plan, must_resume)
    if chosen:
        plan = plan_from(plan, chosen)
    try:
        return _run(plan, chosen, write_report)
    except (Preempted, SystemExit) as stopped:  # SystemExit: a signal outside the loop
        write_status(plan, "preempted", stopped=str(stopped))
        if isinstance(stopped, Preempted):
            barrier()  # an outer launcher may end all ranks with the first that ends
        raise
    except Exception as error:
        is_lost = is_lost_rank(error)
        write_status(plan, "failed", reason="another rank is gone" if is_lost else one_line(error))
        raise


@dataclass(frozen=True)
class _Trained:
    """What the steps of a run change."""

    model: CLIP
    towers: nn.Module  # the model as `wrap_model` gives it
    optimizer: torch.optim.Optimizer
    tuning: Tuning
    scaler: GradScaler | None  # of precision fp16


def _run(plan: Plan, chosen: Chosen | None, write_report: WriteReport[T]) -> T | None:
    """From the checkpoint, the weights or scratch to the report."""
    config, rank = plan.config, rank_and_world_size()[0]
    trained, done = _build(plan, chosen)
    is_finished = done.step >= plan.last_step or should_stop(plan, done.best)
    metrics_log = nullcontext()
    if rank == 0:
        plan.folder.mkdir(parents=True, exist_ok=True)
        recorded = config_to_record(config, chosen)
        write_text(plan.folder / "config.yaml", dump_yaml(to_plain(recorded)))
        after_step = done.step if chosen else -1
        metrics_log = MetricsLog(
            plan.folder, after_step=after_step, report_to=config.train.report_to
        )
    with metrics_log as metrics, only_deterministic(config.train.deterministic):
        monitor = Monitor(plan, done, metrics)
        if plan.retention is not None and not chosen:  # the baseline of retention
            done = replace(done, baseline=_evaluate(plan, trained, {}).metrics)
            monitor.write_evaluation(0, done.baseline)
        cache = build_feature_cache(
            trained.model,
            plan.cached_towers,
            plan.dataset,
            config.data,
            plan.preprocess,
            plan.folder / "features",
            config.train.precision,
        )
        report, done = _fit(plan, trained, done, monitor, cache)
    if rank > 0:
        return None
    result = write_report(report, done.seconds, done.step if is_finished else None)
    write_status(plan, "done", step=done.step)
    return result


def _build(plan: Plan, chosen: Chosen | None) -> tuple[_Trained, checkpoint.Progress]:
    """Model, optimiser and so on, as they were at the checkpoint or at the beginning."""
    config, rank = plan.config, rank_and_world_size()[0]
    torch.manual_seed(config.seed)
    model = CLIP(**to_plain(config.model)).to(plan.device)
    model.tokenizer = plan.tokenizer
    done = chosen.progress if chosen else load_initial_weights(plan, model)
    tuning = Tuning(model, config.finetune, done.new)
    towers = wrap_model(model, config.train)
    optimizer = build_optimizer(model, config.optimizer, tuning.factors)
    torch.manual_seed(config.seed + rank)  # random numbers of training differ by rank
    if chosen:
        folder = plan.folder / "checkpoints" / chosen.folder.name
        done = checkpoint.restore(folder, model, optimizer, tuning)
    elif rank == 0:
        (plan.folder / SKIPPED).unlink(missing_ok=True)  # of a run that left no checkpoint
    scaler = GradScaler(plan.device.type) if config.train.precision == "fp16" else None
    if scaler and done.loss_scale:
        scaler.load_state_dict(done.loss_scale)
    barrier()
    return _Trained(model, towers, optimizer, tuning, scaler), done


def _fit(
    plan: Plan,
    trained: _Trained,
    done: checkpoint.Progress,
    monitor: Monitor,
    cache: FeatureCache,
) -> tuple[Report, checkpoint.Progress]:
    """The loop: from `done` to the last step, with metrics, evaluations and checkpoints."""
    config, report, result = plan.config, None, None
    skipped = _open_skipped(plan)
    began = time.perf_counter() - done.seconds
    write_status(plan, "running", step=done.step)
    with catch_signals() as signals, closing(_batches(plan, done, cache)) as batches, monitor:
        for step in range(done.step, plan.last_step):
            if should_stop(plan, done.best):
                log.info("stopped early at step %d: no improvement after %s", step, done.best)
                break
            batch, position = monitor.wait_for(batches)  # the device works on the last step
            counts = _sum_counts(batch, signals, len(config.data.sources))  # over all ranks
            for reason in skipped.add(counts.bad):
                log.warning("skipped: %s", reason)
            must_save = counts.must_save or _must_save(plan, step + 1)
            must_log = must_save or is_due(step + 1, plan, None, config.train.log_every)
            rate = learning_rate_at(plan, step)
            if counts.samples:
                weight = plan.weight(counts.samples)
                result = _step(
                    plan, trained, cache.replace(batch), rate, weight, must_measure=must_log
                )
                monitor.add(step + 1, batch, result, is_cached=cache.is_used)
            done = _after_step(done, plan, counts, position, time.perf_counter() - began)
            if must_log:
                monitor.report(  # waits for the device
                    done,
                    result,
                    learning_rate=rate,
                    logit_scale=trained.model.logit_scale,
                    scaler=trained.scaler,
                    skipped=len(skipped.found),
                )
            monitor.bar.update(done.step)
            evaluates = plan.tasks or plan.retention
            if evaluates and is_due(done.step, plan, config.evaluate.every_epochs):
                report = _evaluate(plan, trained, done.baseline)
                monitor.write_evaluation(done.step, report.metrics)
                done = replace(done, best=update_best(plan, done.best, report.metrics, done.step))
                must_save = must_save or improved(plan, done.best)
            if must_save:
                _save(plan, done, trained)
            if counts.stop:
                raise Preempted(counts.stop)
    if done.samples == 0:
        raise DataError(f"{config.data.root}: no sample could be used: {skipped.summary()}")
    # A run that had finished before, and is started again, is only evaluated.
    return report or _evaluate(plan, trained, done.baseline), done


def _step(
    plan: Plan,
    trained: _Trained,
    batch: Batch,
    rate: float,
    weight: float,
    *,
    must_measure: bool,
) -> StepResult:
    result = train_step(
        trained.model,
        trained.optimizer,
        batch,
        plan.preprocess,
        rate=rate,
        settings=plan.config.train,
        kind=plan.loss,
        max_gradient_norm=plan.config.optimizer.max_gradient_norm,
        towers=trained.towers,
        must_measure=must_measure,
        scaler=trained.scaler,
        weight=weight,
    )
    trained.tuning.after_step(result.is_finite)
    return result


class _Counts(NamedTuple):
    """Sums over all ranks of a step, and the signals that any of them received."""

    samples: int
    sources: list[int]  # samples by source, of a mixture
    bad: list[Bad]
    stop: int  # a signal's number, or 0
    must_save: bool


def _sum_counts(batch: Batch, signals: Signals, sources: int) -> _Counts:
    """Sum over the ranks: apart from the gradients, the only communication of a step."""
    by_source = torch.bincount(batch.sources, minlength=sources).tolist() if sources else []
    stops = [signals.stop == number for number in STOP_SIGNALS]
    counts = [len(batch), len(batch.bad), signals.save, *stops, *by_source]
    samples, bad, save, *rest = all_reduce_sum([int(count) for count in counts])
    signals.save = False
    stop = next((n for n, count in zip(STOP_SIGNALS, rest, strict=False) if count), 0)
    all_bad = [one for part in all_gather_object(batch.bad) for one in part] if bad else []
    return _Counts(samples, rest[len(STOP_SIGNALS) :], all_bad, stop, bool(save or stop))


def _after_step(
    done: checkpoint.Progress, plan: Plan, counts: _Counts, position: Position, seconds: float
) -> checkpoint.Progress:
    """The progress after one step more."""
    sources = [a + b for a, b in zip_longest(done.sources, counts.sources, fillvalue=0)]
    return replace(
        done,
        step=done.step + 1,
        epoch=position.epoch,
        sample=position.sample,
        samples=done.samples + counts.samples,
        sources=sources,
        seconds=seconds,
        dataset_size=len(plan.dataset),
        batch_size=plan.batch_size,
    )


def _must_save(plan: Plan, step: int) -> bool:
    settings = plan.config.checkpoint
    return is_due(step, plan, settings.every_epochs, settings.every_steps)


def _open_skipped(plan: Plan) -> SkipTracker:
    """The run's skipped samples, the same on every rank; the first one writes them."""
    skipped = SkipTracker(
        plan.dataset.distinct,
        plan.config.data.max_bad_fraction,
        plan.folder / SKIPPED,
        must_write=rank_and_world_size()[0] == 0,
    )
    skipped.found = from_first(lambda: skipped.found)
    return skipped


def _batches(
    plan: Plan, done: checkpoint.Progress, cache: FeatureCache
) -> Generator[tuple[Batch, Position], None, None]:
    """This rank's part of the batches after `done`."""
    config, (rank, world_size) = plan.config, rank_and_world_size()
    return training_batches(
        plan.dataset,
        config.data,
        preprocess=plan.preprocess,
        tokenizer=plan.tokenizer,
        truncate=config.train.truncate_captions,
        batch_size=plan.batch_size,
        seed=config.seed,
        start=Position(done.epoch, done.sample),
        rank=rank,
        world_size=world_size,
        known_bad=cache.known_bad,
    )


def _evaluate(plan: Plan, trained: _Trained, baseline: dict[str, float]) -> Report:
    """Evaluate on all ranks; all get the metrics, the first one the whole report."""
    model = full_model(trained.model)
    with trained.tuning.averaged():
        return evaluate(
            model, plan.tasks, plan.preprocess, retention=plan.retention, baseline=baseline
        )


def _save(plan: Plan, done: checkpoint.Progress, trained: _Trained) -> None:
    """Write a checkpoint; a failure ends the run only after its last step."""
    scaler = trained.scaler
    done = replace(done, loss_scale=scaler.state_dict() if scaler else None)
    try:
        checkpoint.save(
            plan.folder / "checkpoints",
            done,
            trained.model,
            trained.optimizer,
            plan.preprocess,
            keep=plan.config.checkpoint.keep,
            tuning=trained.tuning,
        )
    except OSError as error:
        if done.step == plan.last_step:
            raise
        log.error("no checkpoint at step %d: %s; earlier ones are unchanged", done.step, error)
        return
    write_status(plan, "running", step=done.step)
