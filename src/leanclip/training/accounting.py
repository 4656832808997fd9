"""What a training step had over all ranks, and what is due after it: progress, rate, metrics."""

from dataclasses import replace
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch.amp import GradScaler

from leanclip.config.data import DataConfig
from leanclip.data.batch import Batch, Position
from leanclip.data.skipped import Bad
from leanclip.distributed.collectives import all_gather_object, all_reduce_sum
from leanclip.distributed.preemption import STOP_SIGNALS, Signals
from leanclip.training import checkpoint
from leanclip.training.monitor import peak_memory
from leanclip.training.optimizer import learning_rate
from leanclip.training.plan import Plan
from leanclip.training.step import StepResult


class Seen(NamedTuple):
    """What all ranks have in a step, and what signals asked of any of them."""

    samples: int
    sources: list[int]  # samples by source, of a mixture
    bad: list[Bad]
    stop: int  # a signal's number, or 0
    must_save: bool


def over_ranks(batch: Batch, signals: Signals, sources: int) -> Seen:
    """Put together what each rank has; the one word that ranks change beside the gradients."""
    by_source = torch.bincount(batch.sources, minlength=sources).tolist() if sources else []
    asked = [signals.stop == number for number in STOP_SIGNALS]
    counts = [len(batch), len(batch.bad), signals.save, *asked, *by_source]
    samples, bad, save, *rest = all_reduce_sum([int(count) for count in counts])
    signals.save = False
    stop = next((n for n, is_asked in zip(STOP_SIGNALS, rest, strict=False) if is_asked), 0)
    every_bad = [one for part in all_gather_object(batch.bad) for one in part] if bad else []
    return Seen(samples, rest[len(STOP_SIGNALS) :], every_bad, stop, bool(save or stop))


def after_step(
    done: checkpoint.Progress, plan: Plan, seen: Seen, position: Position, seconds: float
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


def rate_of(plan: Plan, step: int) -> float:
    """The learning rate of a step, by its place in the data."""
    return learning_rate(
        step - plan.offset, peak=plan.peak_learning_rate, warmup=plan.warmup, steps=plan.steps
    )


def is_due(step: int, plan: Plan, every_epochs: int | None, every_steps: int | None = None) -> bool:
    """Whether something is due after this step: at the end, every so many epochs or steps."""
    here = step - plan.offset
    by_epoch = every_epochs is not None and here % (every_epochs * plan.steps_per_epoch) == 0
    by_step = every_steps is not None and step % every_steps == 0
    return step == plan.last_step or by_epoch or by_step


def step_metrics(
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


def _by_source(data: DataConfig, counts: list[int]) -> dict[str, float]:
    """`train/samples/ROOT` of each source of a mixture."""
    return {
        f"train/samples/{source.root}": counts[i] if i < len(counts) else 0
        for i, source in enumerate(data.sources)
    }
