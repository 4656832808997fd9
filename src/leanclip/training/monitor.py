"""What a run reports while it trains: metrics, speed, memory, skipped steps, status.json.

results of steps -> Monitor -> metrics.jsonl and a tracker, and a progress bar or lines of the log
"""

import json
import logging
import math
import re
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
from torch.amp import GradScaler

from leanclip.data.batch import Batch
from leanclip.distributed.collectives import rank_and_world_size
from leanclip.errors import LeanclipError
from leanclip.io.files import write_text
from leanclip.io.progress import ProgressBar
from leanclip.preprocess.patches import Patches
from leanclip.training.checkpoint import Progress
from leanclip.training.plan import Plan
from leanclip.training.step import StepResult
from leanclip.training.tracking import MetricsLog
from leanclip.training.utilisation import Utilisation

T = TypeVar("T")
LOG_SECONDS = 30  # between two lines of the log, without a progress bar
MAX_NAMES = 3  # samples named of a step that was skipped
log = logging.getLogger("leanclip")


def write_status(plan: Plan, state: str, **facts: str | int) -> None:
    """Write status.json into the run's folder, for schedulers."""
    if rank_and_world_size()[0] > 0 or not plan.folder.is_dir():
        return
    text = json.dumps({"state": state, "steps": plan.last_step, "time": time.time(), **facts})
    path = plan.folder / "status.json"
    try:
        write_text(path, text + "\n")
    except OSError as error:
        log.warning("status.json (%s) could not be replaced: %s", state, error)
        with suppress(OSError):  # a full disk may have room in the old file
            path.write_text(text + "\n")


class Monitor:
    """Measures a run between two lines of metrics and reports them; a context manager.

    Args:
        plan: of the run.
        done: where it starts or resumes.
        metrics: where to write; None on all ranks but the first, which report nothing.
    """

    def __init__(self, plan: Plan, done: Progress, metrics: MetricsLog | None) -> None:
        config = plan.config
        self.plan, self.metrics = plan, metrics
        self.nonfinite = NonFiniteTracker(plan)
        self.work = Utilisation(config.model, plan.device, config.train.precision, tf32=config.tf32)
        is_silent = metrics is None
        self.bar = ProgressBar("training", plan.last_step, completed=done.step, is_silent=is_silent)
        self.must_log = not is_silent and not self.bar.is_shown
        self.first_step, self.samples = done.step, done.samples
        self.began = self.last_line = 0.0  # seconds, set on entry
        self.last_log = -math.inf
        self.waited = 0.0  # seconds since the last line

    def __enter__(self) -> "Monitor":
        self.bar.__enter__()
        self.began = self.last_line = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.__exit__()

    def wait_for(self, stream: Iterator[T]) -> T:
        """The next item of a stream; the time it takes is time spent waiting for data."""
        began = time.perf_counter()
        item = next(stream)
        self.waited += time.perf_counter() - began
        return item

    def add(self, step: int, batch: Batch, result: StepResult, *, is_cached: bool) -> None:
        """Add a step on this rank's batch, of features where `is_cached`; nothing is waited for."""
        self.nonfinite.add(step, result.is_finite, batch)
        if not is_cached:
            images = batch.images
            patches = images.values.shape[1] if isinstance(images, Patches) else None
            self.work.add(len(batch), batch.tokens.shape[1], patches)

    def report(
        self,
        done: Progress,
        result: StepResult | None,
        *,
        learning_rate: float,
        logit_scale: torch.Tensor,
        scaler: GradScaler | None,
        skipped: int,
    ) -> None:
        """Report a step's metrics, and speeds since the last report; waits for the device.

        Raises:
            LeanclipError: too many steps in a row were not finite.
        """
        self.nonfinite.raise_if_many()
        plan, seconds = self.plan, time.perf_counter() - self.last_line
        line = {
            "train/loss": result.loss.item() if result else 0.0,
            "train/gradient_norm": result.gradient_norm.item() if result else 0.0,
            "train/lr": learning_rate,
            "train/logit_scale": logit_scale.exp().item(),
            "train/epoch": (done.step - plan.offset) / plan.steps_per_epoch,
            "train/samples": done.samples,
            "train/peak_memory_gb": peak_memory(plan.device),
            "train/skipped": skipped,
            "train/skipped_steps": self.nonfinite.count,
            "train/samples_per_second": (done.samples - self.samples) / seconds,
            "train/data_wait_fraction": self.waited / seconds,
            **self.work.fraction(seconds),
        }
        sources = plan.config.data.sources
        line |= {f"train/samples/{s.root}": n for s, n in zip(sources, done.sources, strict=False)}
        line |= {f"train/{k}": norm.item() for k, norm in (result.norms if result else {}).items()}
        if scaler:
            line["train/loss_scale"] = scaler.get_scale()
        self.samples, self.last_line = done.samples, time.perf_counter()
        self.waited = 0.0
        if self.metrics is not None:
            self.metrics.write(done.step, line)
        self.bar.note(format_metrics(line))
        if self.must_log and self.last_line - self.last_log > LOG_SECONDS:
            self._log(done.step, line)

    def write_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write an evaluation's metrics as `val/...`, and `retention/...`."""
        if self.metrics is not None:
            names = {name: "" if name.startswith("retention/") else "val/" for name in metrics}
            self.metrics.write(step, {names[name] + name: metrics[name] for name in metrics})

    def _log(self, step: int, line: Mapping[str, float]) -> None:
        self.last_log = self.last_line
        seconds_a_step = (self.last_line - self.began) / (step - self.first_step)
        left = _format_seconds((self.plan.last_step - step) * seconds_a_step)
        total, metrics = self.plan.last_step, format_metrics(line)
        log.info("step %s of %s, %s, %s left", f"{step:,}", f"{total:,}", metrics, left)


class NonFiniteTracker:
    """Steps that were skipped because their loss or gradients were not finite."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.count, self.in_a_row = plan, 0, 0
        self._pending: list[tuple[int, torch.Tensor, list[int]]] = []

    def add(self, step: int, is_finite: torch.Tensor, batch: Batch) -> None:
        """Keep a step's flag, which is still on the device, with its samples."""
        self._pending.append((step, is_finite, batch.indices.tolist()))

    def raise_if_many(self) -> None:
        """Read the flags added since the last call.

        Raises:
            LeanclipError: `train.max_skipped_steps` in a row were not finite.
        """
        for step, is_finite, indices in self._pending:
            self.in_a_row = 0 if is_finite else self.in_a_row + 1
            if is_finite:
                continue
            self.count += 1
            known = [index for index in indices if index >= 0]  # those of a stream have no names
            names = ", ".join(self.plan.dataset.name(index) for index in known[:MAX_NAMES])
            more = f" and {len(known) - MAX_NAMES:,} more" if len(known) > MAX_NAMES else ""
            log.warning(
                "step %d skipped: its loss or gradients are not finite%s%s",
                *(step, names and f"; its samples: {names}", more),
            )
            allowed = self.plan.config.train.max_skipped_steps
            if self.in_a_row >= (allowed if step < self.plan.last_step else min(allowed, 3)):
                raise LeanclipError(
                    f"the loss or its gradients were not finite in {self.in_a_row} steps in a row, "
                    f"up to step {step}; lower optimizer.learning_rate, raise "
                    f"optimizer.warmup_fraction or set optimizer.max_gradient_norm, and start again"
                )
        self._pending.clear()


def peak_memory(device: torch.device) -> float:
    """Peak memory in GB (1e9 bytes): of PyTorch on the GPU, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")  # Linux: a child's ru_maxrss begins with its parent's
    if status.is_file() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def format_metrics(line: Mapping[str, float]) -> str:
    """The main metrics of a line, for the progress bar and the log."""
    return ", ".join(
        (
            f"loss {line['train/loss']:.3f}",
            f"lr {line['train/lr']:.1e}",
            f"scale {line['train/logit_scale']:.1f}",
            f"{line['train/samples_per_second']:.0f} images/s",
            f"{line['train/data_wait_fraction']:.0%} waiting for data",
            f"{line['train/peak_memory_gb']:.1f} GB",
        )
    )


def _format_seconds(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
