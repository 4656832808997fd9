"""What a person watches: metrics on disk, and a progress bar.

metrics.jsonl is always written, TensorBoard's files where it is installed.
"""

import json
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

log = logging.getLogger("leanclip")


class MetricsLog:
    """Appends to `metrics.jsonl` in a run's folder, one JSON object a line.

    Every line has `step` and `time` (seconds since 1970) beside the metrics. Lines after
    `after_step`, of a run that is taken up again there, are dropped first.
    """

    def __init__(self, folder: Path, *, after_step: int = 0) -> None:
        path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(folder) if line["step"] <= after_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")
        self._board = None
        if find_spec("tensorboard") is not None:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=after_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the metrics of a step; a full disk is worth a warning, not the run."""
        try:
            self._write(step, metrics)
        except OSError as error:  # what is in the file's buffer goes with the next line
            log.warning("metrics of step %d are not written: %s", step, error)

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "time": time.time(), **metrics}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both."""
        with suppress(OSError):  # said before
            self._file.close()
            if self._board is not None:
                self._board.close()


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl; a line cut short by a crash is left out."""
    path = folder / "metrics.jsonl"
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


class ProgressBar:
    """A bar on stderr: done of total, notes, rate and time left; silent without a terminal.

    Args:
        label: what is going on.
        total: steps until the end.
        completed: steps done before.
        is_silent: show nothing, for all ranks but one.
    """

    def __init__(
        self, label: str, total: int, *, completed: int = 0, is_silent: bool = False
    ) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[notes]}"),
            TimeRemainingColumn(),
            console=console,
            disable=is_silent or not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task(label, total=total, completed=completed, notes="")

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: int, *, total: int | None = None) -> None:
        """Move the bar to `done` steps, of a new total where one is given."""
        self._bar.update(self._task, completed=done, total=total)

    def note(self, text: str) -> None:
        """Show a few words beside the bar."""
        self._bar.update(self._task, notes=text)

    def update_bytes(self, label: str, done: int, total: int) -> None:
        """Move the bar by bytes, shown in millions; a total of 0 is unknown."""
        self._bar.update(
            self._task,
            description=f"{label} (MB)",
            completed=done // 10**6,
            total=-(-total // 10**6) if total else None,
        )
