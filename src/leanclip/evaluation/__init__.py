"""Evaluation: pure metrics over features, and the results that training and `eval` share."""

from leanclip.evaluation.calibration import Calibration
from leanclip.evaluation.classification import Classification, calibration_error, rank_of
from leanclip.evaluation.evaluator import evaluate
from leanclip.evaluation.features import encode_dataset, encode_texts
from leanclip.evaluation.results import Report
from leanclip.evaluation.retrieval import (
    RetrievalResult,
    recall_at_k,
    retrieval_metrics,
    retrieval_ranks,
    retrieve,
)
from leanclip.evaluation.statistics import bootstrap
from leanclip.evaluation.tasks import METRICS, Task, open_retention, open_tasks
from leanclip.evaluation.zero_shot import build_classifier, zero_shot

__all__ = [
    "METRICS",
    "Calibration",
    "Classification",
    "Report",
    "RetrievalResult",
    "Task",
    "bootstrap",
    "build_classifier",
    "calibration_error",
    "encode_dataset",
    "encode_texts",
    "evaluate",
    "open_retention",
    "open_tasks",
    "rank_of",
    "recall_at_k",
    "retrieval_metrics",
    "retrieval_ranks",
    "retrieve",
    "zero_shot",
]
