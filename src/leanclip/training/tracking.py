"""The metrics of a run, on disk and in an experiment tracker.

metrics.jsonl is always written. A tracker is imported only if it is selected: TensorBoard (the
default where it is installed), Weights & Biases, or trackio.
"""

import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from leanclip.errors import ConfigError
from leanclip.io.files import read_metrics, write_text

log = logging.getLogger("leanclip")

Write = Callable[[int, Mapping[str, float]], object]


def check_tracker(report_to: str | None) -> None:
    """Check that a tracker is installed, without importing it.

    Raises:
        ConfigError: it is not.
    """
    if report_to not in (None, "auto") and find_spec(report_to) is None:
        raise ConfigError(
            f"train.report_to: {report_to} is not installed; pip install {report_to}, or set it "
            f"to null for metrics.jsonl alone"
        )


class MetricsLog:
    """Appends to `metrics.jsonl` in a run's folder, one JSON object per line; a context manager.

    Every line has `step` and `time` (Unix time in seconds) beside the metrics. Lines after
    `after_step`, at which the run resumes, are dropped first.
    """

    def __init__(
        self, folder: Path, *, after_step: int = 0, report_to: str | None = "auto"
    ) -> None:
        path = folder / "metrics.jsonl"
        lines = [line for line in read_metrics(folder) if line["step"] <= after_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = path.open("a", encoding="utf-8")
        self._track, self._close_tracker = _open_tracker(report_to, folder, after_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step; a full disk is a warning and does not end the run."""
        try:
            self._file.write(json.dumps({"step": step, "time": time.time(), **metrics}) + "\n")
            self._file.flush()
            self._track(step, metrics)
        except OSError as error:  # the file's buffer is written with the next line
            log.warning("metrics of step %d are not written: %s", step, error)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # a warning was logged
            self._file.close()
            self._close_tracker()


def _open_tracker(
    report_to: str | None, folder: Path, after_step: int
) -> tuple[Write, Callable[[], object]]:
    """What writes the metrics of a step to the tracker, and what closes it."""
    if report_to == "auto":
        report_to = "tensorboard" if find_spec("tensorboard") is not None else None
    if report_to is None:
        return lambda step, metrics: None, lambda: None
    check_tracker(report_to)
    if report_to == "tensorboard":
        from torch.utils.tensorboard.writer import SummaryWriter

        board = SummaryWriter(str(folder / "tensorboard"), purge_step=after_step + 1)

        def add_scalars(step: int, metrics: Mapping[str, float]) -> None:
            for name, value in metrics.items():
                board.add_scalar(name, value, step)

        return add_scalars, board.close
    library: Any = import_module(report_to)  # trackio has the calls of wandb
    path = folder / f"{report_to}-run"  # two runs' folders may have the same last name
    if not path.is_file():
        write_text(path, f"{folder.name}-{uuid.uuid4().hex[:8]}\n")
    name = path.read_text(encoding="utf-8").strip()
    own = {"id": name, "dir": str(folder)} if report_to == "wandb" else {}
    library.init(project="leanclip", name=name, resume="allow", **own)
    return lambda step, metrics: library.log(dict(metrics), step=step), library.finish
