"""Evaluation: pure metrics over features, and the report that training and `eval` share."""

from leanclip.evaluate.calibration import Calibration
from leanclip.evaluate.report import Report, evaluate
from leanclip.evaluate.retrieval import recall_at_k, retrieval_metrics
from leanclip.evaluate.tasks import METRICS, Task, evaluation_config, open_guard, open_tasks
from leanclip.evaluate.zero_shot import build_classifier, zero_shot_metrics

__all__ = [
    "METRICS",
    "Calibration",
    "Report",
    "Task",
    "build_classifier",
    "evaluate",
    "evaluation_config",
    "open_guard",
    "open_tasks",
    "recall_at_k",
    "retrieval_metrics",
    "zero_shot_metrics",
]
