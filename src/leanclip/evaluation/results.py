"""The results of an evaluation: metrics with intervals, predictions; and `report.json`."""

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from leanclip.evaluation.calibration import Calibration
from leanclip.evaluation.classification import Classification
from leanclip.evaluation.intervals import LEVEL, RESAMPLES, Interval
from leanclip.evaluation.retrieval import RetrievalResult
from leanclip.evaluation.tasks import Task
from leanclip.io.files import write_text

FILE = "report.json"

Result = Classification | RetrievalResult  # a ZeroShotResult or a ProbeResult is the former


@dataclass
class Report:
    """Metrics by name, and the results they follow from."""

    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)  # 95%, by names of metrics
    results: dict[str, Result] = field(
        default_factory=dict
    )  # by names of tasks; "retention/..." too
    tasks: dict[str, Task] = field(default_factory=dict)  # whose data the results are of
    examples: list[tuple[Path | bytes, str]] = field(default_factory=list)  # image, its text
    similarity: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))  # of the examples
    predictions: list[tuple[Path | bytes, str, str]] = field(
        default_factory=list
    )  # image, predicted, target
    bad: dict[str, str] = field(default_factory=dict)  # id -> reason
    baseline: dict[str, float] = field(default_factory=dict)  # metrics before fine-tuning
    weights: str = ""  # weights.fingerprint of the model's state
    data: dict[str, dict[str, Any]] = field(default_factory=dict)  # by names of tasks
    calibration: Calibration | None = None
    calibrated_on: str = ""  # which images, in words
    calibration_test_images: int = 0  # that the `calibrated_*` metrics are of
    source: str = ""  # where the weights are
    command: str = ""  # that measures the same again

    def facts(self) -> dict[str, Any]:
        """What `report.json` holds, as plain values: docs/evaluate.md describes them."""
        found = {
            "metrics": {k: v if math.isfinite(v) else None for k, v in self.metrics.items()},
            "intervals": self.intervals,
            "interval_level": LEVEL,
            "resamples": RESAMPLES,
            "weights": {"source": self.source, "sha256": self.weights},
            "data": self.data,
            "command": self.command,
            "versions": _versions(),
            "classes": {k: _classes(r) for k, r in self.results.items() if _has_classes(r)},
            "bad": self.bad,
        }
        return found | ({"baseline": self.baseline} if self.baseline else {})

    def write(self, folder: Path, sentences: Sequence[str]) -> None:
        """Write `report.json`, with the results in words, in an existing folder."""
        write_text(folder / FILE, _json({"sentences": [*sentences]} | self.facts()) + "\n")


def _has_classes(result: Result) -> bool:
    return isinstance(result, Classification)


def _classes(result: Result) -> dict[str, Any]:
    """The table of classes, and the mistakes, most frequent first, and all of them by label."""
    assert isinstance(result, Classification)
    names = result.classes
    return {
        "per_class": result.per_class(),
        "most_confused": [
            {"label": names[label], "predicted": names[predicted], "images": images}
            for label, predicted, images in result.most_confused()
        ],
        "confusion": result.confused().tolist(),
    }


def _versions() -> dict[str, str]:
    names = ("leanclip", "torch", "numpy", "pillow")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def _json(value: Any, depth: int = 0) -> str:
    """JSON with a line per entry of the outer groups, and inner ones on one line."""
    pad = " " * (depth + 1)
    if depth < 3 and isinstance(value, dict) and value:
        inner = (f"{pad}{json.dumps(k)}: {_json(v, depth + 1)}" for k, v in value.items())
        return "{\n" + ",\n".join(inner) + f"\n{pad[1:]}}}"
    if depth < 4 and isinstance(value, list) and value and isinstance(value[0], dict | str):
        inner = (f"{pad}{json.dumps(one)}" for one in value)
        return "[\n" + ",\n".join(inner) + f"\n{pad[1:]}]"
    return json.dumps(value)
