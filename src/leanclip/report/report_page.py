"""The report on one page, `report.html`: metrics, curves, and what each task's result looks like.

Report, metrics.jsonl -> values (of a task's result: results.py) -> templates/report.html
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leanclip.data.skipped import SkipTracker
from leanclip.evaluation.results import Report
from leanclip.io.files import read_metrics
from leanclip.report.page import svg, tile, write_page
from leanclip.report.plots import line_chart, training_charts
from leanclip.report.results import task_values
from leanclip.report.text import (
    NOT_FRACTIONS,
    by_importance,
    count,
    format_interval,
    format_metric,
    metric_label,
    sample_note,
    sentences,
)

FILE = "report.html"
MAX_SKIPPED = 20  # samples named on the page; report.json names all


def write_report_page(folder: Path, report: Report, skipped: SkipTracker | None = None) -> Path:
    """Write `report.html` into an existing folder, which may be a run's.

    `skipped` are the samples that training skipped.
    """
    metrics = {name: _metric(report, name) for name in report.metrics}
    charts = training_charts(read_metrics(folder) or read_metrics(Path(report.source)))
    versions = report.facts()["versions"]
    write_page(
        folder / FILE,
        "report.html",
        title=f"leanclip report: {Path(report.source or folder).name}",
        report=report,
        sentences=sentences(report),
        metrics=list(metrics.values()),
        metrics_by_importance=[metrics[name] for name in by_importance(report)],
        has_baseline=bool(report.baseline),
        charts={title: svg(line_chart(series), title) for title, series in charts.items()},
        tasks=_tasks(report),
        similarity=_similarity(report),
        data_sets=[_data_set(name, data) for name, data in report.data.items()],
        versions=", ".join(f"{name} {number}" for name, number in versions.items()),
        bad=list(report.bad.items())[:MAX_SKIPPED],
        bad_count=count(len(report.bad), "sample"),
        skipped=skipped.summary() if skipped is not None and skipped.found else "",
    )
    return folder / FILE


def _metric(report: Report, name: str) -> dict[str, Any]:
    value, interval = report.metrics[name], report.intervals.get(name)
    is_fraction = 0 <= value <= 1 and not name.endswith(NOT_FRACTIONS)
    return {
        "label": metric_label(name),
        "value": format_metric(name, value),
        "fraction": value if is_fraction else None,
        "interval": interval,
        "interval_text": format_interval(name, interval) if interval else "",
        "baseline": format_metric(name, report.baseline[name]) if name in report.baseline else "",
    }


def _tasks(report: Report) -> list[dict[str, Any]]:
    """What the page shows of each task; nearest images once per data set."""
    found, seen = [], set()
    for name, result in report.results.items():
        task, data = report.tasks[name], report.data[name]["sha256"]
        title = f"{name.replace('_', ' ').replace('/', ', ')}: {task.data.root}"
        values = task_values(name, result, task, with_neighbours=data not in seen)
        found.append({"title": f"{title[0].upper()}{title[1:]}"} | values)
        seen.add(data)
    return found


def _similarity(report: Report) -> dict[str, Any] | None:
    """Cosine similarities of the examples, rows of texts under columns of images."""
    if not report.examples:
        return None
    values = report.similarity.tolist()
    finite = [value for row in values for value in row if math.isfinite(value)] or [0.0]
    low, spread = min(finite), max(finite) - min(finite) or 1.0

    def cell(value: float) -> dict[str, Any]:
        if not math.isfinite(value):
            return {"text": "–", "fraction": 0.0}
        return {"text": f"{value:.2f}", "fraction": (value - low) / spread}

    texts = [text for _, text in report.examples]
    return {
        "images": [tile(image, text) for image, text in report.examples],
        "rows": [(text, list(map(cell, row))) for text, row in zip(texts, values, strict=True)],
    }


def _data_set(name: str, data: Mapping[str, Any]) -> dict[str, str]:
    split = f", {data['split']}" if data["split"] else ""
    words = f"{data['format']}:{data['root']}{split}, {count(data['samples'], 'image')}"
    note = sample_note(data)
    return {
        "name": name.replace("_", " "),
        "words": f"{words}. {note}" if note else words,
        "sha256": data["sha256"],
    }
