"""The metrics of a run, on disk and with a tracker.

metrics.jsonl is always written. A tracker is imported only where it is chosen: TensorBoard's files
(by default where it is installed), Weights & Biases, or trackio.
"""

import json
import logging
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from leanclip.errors import ConfigError
from leanclip.io.files import read_metrics, write_text


def check_tracker(report_to: str | None) -> None:
    """See that a tracker is installed, without importing it.

    Raises:
        ConfigError: it is not.
    """
    if report_to not in (None, "auto") and find_spec(report_to) is None:
        raise ConfigError(
            f"train.report_to: {report_to} is not installed; pip install {report_to}, or set it "
            f"to null for metrics.jsonl alone"
        )


log = logging.getLogger("leanclip")


class MetricsLog:
    """Appends to `metrics.jsonl` in a run's folder, one JSON object a line.

    Every line has `step` and `time` (seconds since 1970) beside the metrics. Lines after
    `after_step`, of a run that is taken up again there, are dropped first.
    """

    def __init__(
        self, folder: Path, *, after_step: int = 0, report_to: str | None = "auto"
    ) -> None:
        path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(folder) if line["step"] <= after_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")
        self._tracker = _open_tracker(report_to, folder, after_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the metrics of a step; a full disk is worth a warning, not the run."""
        try:
            self._write(step, metrics)
        except OSError as error:  # what is in the file's buffer goes with the next line
            log.warning("metrics of step %d are not written: %s", step, error)

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "time": time.time(), **metrics}) + "\n")
        self._file.flush()
        if self._tracker is not None:
            self._tracker.write(step, metrics)

    def close(self) -> None:
        """Flush and close all."""
        with suppress(OSError):  # said before
            self._file.close()
            if self._tracker is not None:
                self._tracker.close()


class _Tracker(Protocol):
    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


def _open_tracker(report_to: str | None, folder: Path, after_step: int) -> _Tracker | None:
    if report_to == "auto":
        report_to = "tensorboard" if find_spec("tensorboard") is not None else None
    if report_to is None:
        return None
    check_tracker(report_to)
    return (
        _TensorBoard(folder, after_step) if report_to == "tensorboard" else _Run(report_to, folder)
    )


class _TensorBoard:
    def __init__(self, folder: Path, after_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=after_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()


class _Run:
    """A run of wandb, or of trackio, which has the same calls; taken up again by its name."""

    def __init__(self, library: str, folder: Path) -> None:
        self._library: Any = import_module(library)
        path = folder / f"{library}-run"  # of its own: two folders may have the same last name
        if not path.is_file():
            write_text(path, f"{folder.name}-{uuid.uuid4().hex[:8]}\n")
        name = path.read_text(encoding="utf-8").strip()
        own = {"id": name, "dir": str(folder)} if library == "wandb" else {}
        self._library.init(project="leanclip", name=name, resume="allow", **own)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._library.log(dict(metrics), step=step)

    def close(self) -> None:
        self._library.finish()
