"""Evaluation: pure metrics over features, and the report that training and `eval` share."""

from leanclip.evaluation.calibration import Calibration
from leanclip.evaluation.classification import Classification, calibration_error, rank_of
from leanclip.evaluation.evaluator import evaluate
from leanclip.evaluation.features import Encoded, encode_dataset, encode_texts
from leanclip.evaluation.intervals import bootstrap
from leanclip.evaluation.options import TASKS, EvalOptions, evaluation_config
from leanclip.evaluation.probe import ProbeResult
from leanclip.evaluation.results import Report
from leanclip.evaluation.retrieval import (
    RetrievalResult,
    recall_at_k,
    retrieval_metrics,
    retrieval_ranks,
    retrieve,
)
from leanclip.evaluation.tasks import METRICS, Task, open_retention, open_tasks
from leanclip.evaluation.zero_shot import (
    ZeroShotResult,
    build_classifier,
    zero_shot,
)

__all__ = [
    "METRICS",
    "TASKS",
    "Calibration",
    "Classification",
    "Encoded",
    "EvalOptions",
    "ProbeResult",
    "Report",
    "RetrievalResult",
    "Task",
    "ZeroShotResult",
    "bootstrap",
    "build_classifier",
    "calibration_error",
    "encode_dataset",
    "encode_texts",
    "evaluate",
    "evaluation_config",
    "open_retention",
    "open_tasks",
    "rank_of",
    "recall_at_k",
    "retrieval_metrics",
    "retrieval_ranks",
    "retrieve",
    "zero_shot",
]
