"""Training: a plan in, a run's folder out.

    plan -> start (scratch, weights or checkpoint) -> loop -> evaluate -> pictures

The run's folder holds config.yaml, metrics.jsonl, checkpoints/, evaluation.json and pictures.
The same command in the same folder goes on from the newest checkpoint.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from leanclip import checkpoint
from leanclip.config import Config, DataConfig
from leanclip.data.loader import Batch, Position, training_batches
from leanclip.data.skipped import BadSamples
from leanclip.errors import ConfigError, LeanclipError
from leanclip.evaluate import Report, evaluate, open_tasks
from leanclip.images import Preprocess, normalize
from leanclip.loss import clip_loss
from leanclip.model import CLIP
from leanclip.optim import build_optimizer, learning_rate
from leanclip.plan import Plan, model_preprocess
from leanclip.plots import run_pictures
from leanclip.settings import differences, parse, to_plain
from leanclip.strict_yaml import dump_yaml, load_yaml
from leanclip.tracking import MetricsLog, ProgressBar, write_text
from leanclip.weights import load_into, read_weights

T = TypeVar("T")
SKIPPED = "skipped.jsonl"  # in the run's folder
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


def train(plan: Plan, *, must_resume: bool = False) -> Outcome:
    """Train to the end, from the newest checkpoint in the run's folder where there is one.

    Raises:
        ConfigError: the folder holds a run of another configuration; or `must_resume` and
            there is no checkpoint.
        DataError: more than the allowed share of the data is unreadable.
        WeightsError: the weights to start from do not fit the model.
    """
    config = plan.config
    torch.manual_seed(config.seed)
    model = CLIP(**to_plain(config.model)).to(plan.device)
    optimizer = build_optimizer(model, config.optimizer)
    done = _start(plan, model, optimizer, must_resume)
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_text(plan.folder / "config.yaml", dump_yaml(to_plain(config)))
    metrics = MetricsLog(plan.folder, after_step=done.step)
    try:
        report, done = _fit(plan, model, optimizer, done, metrics)
    finally:
        metrics.close()
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


def train_step(
    model: CLIP,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    preprocess: Preprocess,
    *,
    rate: float,
    precision: str = "fp32",
    max_gradient_norm: float | None = None,
) -> torch.Tensor:
    """One step of the optimiser on one batch; gives the loss, still on the device.

    A batch without a readable sample changes nothing; its loss is 0.
    """
    if len(batch) == 0:
        return torch.zeros(())
    device = model.logit_scale.device
    tokens = batch.tokens.to(device, non_blocking=True)  # (B, L)
    pixels = batch.images.to(device, non_blocking=True)  # (B, 3, R, R) uint8
    pixels = normalize(pixels, preprocess.mean, preprocess.std)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        features = model(pixels, tokens)
    loss = clip_loss(features.image, features.text, features.scale)
    loss.backward()
    if max_gradient_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_gradient_norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    model.clamp_logit_scale()
    return loss.detach()


def _fit(
    plan: Plan,
    model: CLIP,
    optimizer: torch.optim.Optimizer,
    done: checkpoint.Progress,
    metrics: MetricsLog,
) -> tuple[Report, checkpoint.Progress]:
    """The loop: from `done` to the last step, with metrics, evaluations and checkpoints."""
    config, report = plan.config, None
    bad = BadSamples(len(plan.dataset), config.data.max_bad_share, plan.folder / SKIPPED)
    stream = training_batches(
        plan.dataset,
        config.data,
        resolution=config.model.image_resolution,
        context_length=config.model.context_length,
        truncate=config.train.truncate_captions,
        batch_size=plan.batch_size,
        seed=config.seed,
        start=Position(done.epoch, done.sample),
    )
    clock = _Clock(done.samples)
    began = time.perf_counter() - done.seconds
    with ProgressBar("training", plan.steps, completed=done.step) as bar:
        for step in range(done.step, plan.steps):
            batch, position = clock.waiting(lambda: next(stream))
            for reason in bad.add(batch.bad):
                log.warning("skipped: %s", reason)
            rate = learning_rate(step, peak=plan.peak_rate, warmup=plan.warmup, steps=plan.steps)
            loss = train_step(
                model,
                optimizer,
                batch,
                plan.preprocess,
                rate=rate,
                precision=config.train.precision,
                max_gradient_norm=config.optimizer.max_gradient_norm,
            )
            done = checkpoint.Progress(
                step + 1,
                *position,
                done.samples + len(batch),
                _counted(done.sources, batch.sources),
                time.perf_counter() - began,
            )
            must_save = _is_due(
                done.step,
                plan,
                every_epochs=config.checkpoint.every_epochs,
                every_steps=config.checkpoint.every_steps,
            )
            if must_save or _is_due(done.step, plan, every_steps=config.train.log_every):
                line = {
                    "train/loss": _finite(loss.item(), done.step),  # waits for the device
                    "train/lr": rate,
                    "train/logit_scale": model.logit_scale.exp().item(),
                    "train/epoch": done.step / plan.steps_per_epoch,
                    "train/samples": done.samples,
                    "train/skipped": len(bad.found),
                    **_by_source(config.data, done.sources),
                    **clock.rates(done.samples),
                }
                metrics.write(done.step, line)
                bar.note(
                    f"loss {line['train/loss']:.3f}  "
                    f"{line['train/samples_per_second']:.0f} images/s  "
                    f"{line['train/data_wait_share']:.0%} waiting for data"
                )
            bar.update(done.step)
            if plan.tasks and _is_due(done.step, plan, every_epochs=config.evaluate.every_epochs):
                report = evaluate(model, plan.tasks, plan.preprocess)
                metrics.write(done.step, {f"val/{k}": v for k, v in report.metrics.items()})
            if must_save:
                checkpoint.save(
                    plan.folder / "checkpoints",
                    done,
                    model,
                    optimizer,
                    plan.preprocess,
                    keep=config.checkpoint.keep,
                )
    clock.log_waiting()
    # A run that is taken up again after its last step has nothing left but to be measured.
    return report or evaluate(model, plan.tasks, plan.preprocess), done


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


def _counted(sources: list[int], batch: torch.Tensor) -> list[int]:
    """Samples by source, with those of a batch."""
    more = torch.bincount(batch, minlength=len(sources))
    more[: len(sources)] += torch.tensor(sources, dtype=more.dtype)
    return more.tolist()


def _by_source(data: DataConfig, counts: list[int]) -> dict[str, float]:
    """`train/samples/ROOT` of each source of a mixture."""
    return {
        f"train/samples/{source.root}": counts[i] if i < len(counts) else 0
        for i, source in enumerate(data.sources)
    }


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise LeanclipError(
            f"the loss is {loss} at step {step}; lower optimizer.learning_rate, lengthen "
            f"optimizer.warmup or set optimizer.max_gradient_norm, and start again"
        )
    return loss


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
