"""The results of an evaluation: metrics with intervals, and the predictions they follow from."""

from dataclasses import dataclass, field
from typing import Any

from leanclip.evaluation.calibration import Calibrated
from leanclip.evaluation.classification import Classification
from leanclip.evaluation.retrieval import RetrievalResult
from leanclip.evaluation.statistics import Interval
from leanclip.evaluation.tasks import Task

Result = Classification | RetrievalResult  # ZeroShotResult and ProbeResult are the former


@dataclass
class Report:
    """Metrics and results by name; names of the retention benchmark begin with "retention/"."""

    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)  # 95%, by metric
    results: dict[str, Result] = field(default_factory=dict)  # by task
    tasks: dict[str, Task] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)  # by task, as in report.json
    bad: dict[str, str] = field(default_factory=dict)  # id -> reason
    baseline: dict[str, float] = field(default_factory=dict)  # metrics before fine-tuning
    calibrated: Calibrated | None = None
    weights: str = ""  # fingerprint of the model's state
    source: str = ""  # where the weights are
    command: str = ""  # that reproduces the report

    def add_calibration(self, calibrated: Calibrated | None) -> None:
        """Add the metrics of a calibration; None on ranks other than the first."""
        if calibrated is not None:
            self.calibrated = calibrated
            self.metrics |= calibrated.metrics
            self.intervals |= calibrated.intervals
            self.bad |= calibrated.bad
