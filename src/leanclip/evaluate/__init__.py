"""Evaluation: pure metrics over features, and the report that training and `eval` share."""

from leanclip.evaluate.calibration import Calibration
from leanclip.evaluate.classification import Classification, calibration_error, rank_of
from leanclip.evaluate.command import TASKS, Wishes, evaluation_config
from leanclip.evaluate.features import Encoded, encode_dataset, encode_texts
from leanclip.evaluate.intervals import bootstrap
from leanclip.evaluate.measure import evaluate
from leanclip.evaluate.probe import ProbeResult
from leanclip.evaluate.report import Report
from leanclip.evaluate.retrieval import (
    RetrievalResult,
    recall_at_k,
    retrieval_metrics,
    retrieval_ranks,
    retrieve,
)
from leanclip.evaluate.tasks import METRICS, Task, open_guard, open_tasks
from leanclip.evaluate.zero_shot import (
    ZeroShotResult,
    build_classifier,
    cached_classifier,
    zero_shot,
)

__all__ = [
    "METRICS",
    "TASKS",
    "Calibration",
    "Classification",
    "Encoded",
    "ProbeResult",
    "Report",
    "RetrievalResult",
    "Task",
    "Wishes",
    "ZeroShotResult",
    "bootstrap",
    "build_classifier",
    "cached_classifier",
    "calibration_error",
    "encode_dataset",
    "encode_texts",
    "evaluate",
    "evaluation_config",
    "open_guard",
    "open_tasks",
    "rank_of",
    "recall_at_k",
    "retrieval_metrics",
    "retrieval_ranks",
    "retrieve",
    "zero_shot",
]
