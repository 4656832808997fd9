"""What a run is watched by: its pace, memory, the steps it had to leave out, and status.json."""

import json
import logging
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from leanclip.data.batch import Batch
from leanclip.distributed.collectives import rank_and_world_size
from leanclip.errors import LeanclipError
from leanclip.io.files import write_text
from leanclip.training.plan import Plan
from leanclip.training.utilisation import Utilisation

T = TypeVar("T")
LOG_SECONDS = 30  # between two lines of a log that nobody watches as a progress bar
NAMED = 3  # samples of a step that was left out
SLOW_DATA_FRACTION = 0.2  # share of the time from which waiting for data is worth a word
log = logging.getLogger("leanclip")


def write_status(plan: Plan, state: str, **facts: str | int) -> None:
    """Write status.json into the run's folder, for schedulers."""
    if rank_and_world_size()[0] == 0 and plan.folder.is_dir():
        text = json.dumps({"state": state, "steps": plan.last_step, "time": time.time(), **facts})
        path = plan.folder / "status.json"
        try:
            write_text(path, text + "\n")
        except OSError as error:
            try:  # on a full disk there may be room where the file is
                _overwrite(path, text + "\n")
            except OSError:
                log.warning("status.json does not say %s: %s", state, error)


def _overwrite(path: Path, text: str) -> None:
    """Write a file in its place, which takes no more room than it has."""
    with path.open("r+b") as file:
        file.write(text.encode())
        file.truncate()


class NonFiniteTracker:
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
            known = [index for index in indices if index >= 0]  # in a stream they have no names
            names = ", ".join(self.plan.dataset.name(index) for index in known[:NAMED])
            more = f" and {len(known) - NAMED:,} more" if len(known) > NAMED else ""
            log.warning(
                "step %d left out: its loss or gradients are not finite%s%s",
                *(step, names and f"; its samples: {names}", more),
            )
            allowed = self.plan.config.train.max_skipped_steps
            if self.in_a_row >= (allowed if step < self.plan.last_step else min(allowed, 3)):
                raise LeanclipError(
                    f"the loss or its gradients were not finite in {self.in_a_row} steps in a row, "
                    f"to step {step}; lower optimizer.learning_rate, raise "
                    f"optimizer.warmup_fraction or set optimizer.max_gradient_norm, and start again"
                )
        self._pending.clear()


class Clock:
    """Time since the last line of metrics: samples per second, share of it waiting for data.

    Where the device's peak is known also the share of it that this rank's work makes.
    """

    def __init__(self, plan: Plan, samples: int) -> None:
        config = plan.config
        precision = config.train.precision
        self.work = Utilisation(config.model, plan.device, precision, tf32=config.tf32)
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
            **self.work.share(seconds),
        }
        self.waited_before += self.waited
        self.samples, self.began, self.waited = samples, time.perf_counter(), 0.0
        return figures

    def log_waiting(self) -> None:
        """Say how much of the whole time went by waiting for data, where it is much."""
        seconds = time.perf_counter() - self.first_began
        share = (self.waited_before + self.waited) / seconds
        if share > SLOW_DATA_FRACTION and seconds > 10:
            log.info(
                "%.0f%% of the time was spent waiting for data: docs/data.md, Speed, says "
                "what helps",
                100 * share,
            )


def peak_memory(device: torch.device) -> float:
    """The most memory so far, in 1e9 bytes: PyTorch's on the GPU, or this process's on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")  # of Linux; there ru_maxrss is at least the parent's
    if status.is_file() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def format_metrics(line: Mapping[str, float]) -> str:
    """A line of metrics, for the progress bar."""
    return "  ".join(
        (
            f"loss {line['train/loss']:.3f}",
            f"lr {line['train/lr']:.1e}",
            f"scale {line['train/logit_scale']:.1f}",
            f"{line['train/samples_per_second']:.0f} images/s",
            f"{line['train/data_wait_share']:.0%} waiting for data",
            f"{line['train/peak_memory_gb']:.1f} GB",
        )
    )


class LogLines:
    """Now and then a line in the log where there is no progress bar, to show that it lives."""

    def __init__(self, plan: Plan, *, done: int, is_silent: bool) -> None:
        self.steps, self.is_silent = plan.last_step, is_silent
        self.first, self.began, self.last = done, time.perf_counter(), 0.0

    def note(self, step: int, line: Mapping[str, float]) -> None:
        """Log a step's metrics where the last line is long enough ago."""
        now = time.perf_counter()
        if self.is_silent or now - self.last < LOG_SECONDS:
            return
        self.last = now
        left = (self.steps - step) * (now - self.began) / (step - self.first)
        log.info(
            "step %s of %s, loss %.3f, %.0f images/s, %.0f%% waiting for data, %s left",
            *(f"{step:,}", f"{self.steps:,}", line["train/loss"]),
            *(line["train/samples_per_second"], 100 * line["train/data_wait_share"]),
            _in_time(left),
        )


def _in_time(seconds: float) -> str:
    """Seconds, minutes or hours, as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
