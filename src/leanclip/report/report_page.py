"""A report as report.json and as a page, report.html.

Report, metrics.jsonl -> values -> templates/report.html

Shapes: N images, C classes, Q queries.
"""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leanclip.data.skipped import SkipTracker
from leanclip.evaluation.classification import Classification
from leanclip.evaluation.results import Report, Result
from leanclip.evaluation.retrieval import RetrievalResult
from leanclip.evaluation.statistics import LEVEL, RESAMPLES
from leanclip.evaluation.tasks import Task
from leanclip.io.files import read_metrics, write_text
from leanclip.report.page import Tile, shorten, svg, tile, write_page
from leanclip.report.plots import confusion_matrix, line_chart, training_charts
from leanclip.report.samples import examples, image_of
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

MAX_SKIPPED = 20  # samples named on the page; report.json names all
MAX_MATRIX = 40  # classes of a confusion matrix
CONFUSED_PAIRS = 6  # pairs of classes shown with images
EXTREMES = 8  # best classes, and worst
QUERIES = 6  # images whose nearest images are shown
NEIGHBOURS = 5


def write_report(folder: Path, report: Report, skipped: SkipTracker | None = None) -> Path:
    """Write report.json and report.html into an existing folder, which may be a run's.

    `skipped` are the samples that training skipped. Returns the path of the page.
    """
    values = report_values(report)
    text = json.dumps({"sentences": sentences(report)} | values, indent=1)
    write_text(folder / "report.json", text + "\n")
    metrics = {name: _metric(report, name) for name in report.metrics}
    charts = training_charts(read_metrics(folder) or read_metrics(Path(report.source)))
    write_page(
        folder / "report.html",
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
        versions=", ".join(f"{name} {number}" for name, number in values["versions"].items()),
        bad=list(report.bad.items())[:MAX_SKIPPED],
        bad_count=count(len(report.bad), "sample"),
        skipped=skipped.summary() if skipped is not None and skipped.found else "",
    )
    return folder / "report.html"


def report_values(report: Report) -> dict[str, Any]:
    """The content of report.json, but the sentences; docs/evaluate.md describes it."""
    versions = {name: version(name) for name in ("leanclip", "torch", "numpy", "pillow")}
    values = {
        "metrics": {k: v if math.isfinite(v) else None for k, v in report.metrics.items()},
        "intervals": report.intervals,
        "interval_level": LEVEL,
        "resamples": RESAMPLES,
        "weights": {"source": report.source, "sha256": report.weights},
        "data": report.data,
        "command": report.command,
        "versions": {"python": platform.python_version()} | versions,
        "classes": {
            name: _classes(result)
            for name, result in report.results.items()
            if isinstance(result, Classification)
        },
        "bad": report.bad,
    }
    return values | ({"baseline": report.baseline} if report.baseline else {})


def _classes(result: Classification) -> dict[str, Any]:
    names = result.classes
    return {
        "per_class": result.per_class(),
        "most_confused": [
            {"label": names[label], "predicted": names[predicted], "images": images}
            for label, predicted, images in result.most_confused()
        ],
        "confusion": result.confused().tolist(),
    }


def _metric(report: Report, name: str) -> dict[str, Any]:
    value, interval, baseline = report.metrics[name], report.intervals.get(name), report.baseline
    is_fraction = 0 <= value <= 1 and not name.endswith(NOT_FRACTIONS)
    return {
        "label": metric_label(name),
        "value": format_metric(name, value),
        "fraction": value if is_fraction else None,
        "interval": interval,
        "interval_text": format_interval(name, interval) if interval else "",
        "baseline": format_metric(name, baseline[name]) if name in baseline else "",
    }


def _similarity(report: Report) -> dict[str, Any] | None:
    """Cosine similarities of the examples, rows of texts under columns of images."""
    found = examples(report)
    if found is None:
        return None
    finite = found.similarity[np.isfinite(found.similarity)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)

    def cell(value: float) -> dict[str, Any]:
        if not math.isfinite(value):
            return {"text": "–", "fraction": 0.0}
        return {"text": f"{value:.2f}", "fraction": float((value - low) / ((high - low) or 1))}

    return {
        "images": [tile(*pair) for pair in zip(found.images, found.texts, strict=True)],
        "rows": [
            (text, [cell(value) for value in row])
            for text, row in zip(found.texts, found.similarity, strict=True)
        ],
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


def _tasks(report: Report) -> list[dict[str, Any]]:
    """The section of each task; nearest images once per data set."""
    found, seen = [], set()
    for name, result in report.results.items():
        task, data = report.tasks[name], report.data[name]["sha256"]
        title = f"{name.replace('_', ' ').replace('/', ', ')}: {task.data.root}"
        values = {
            "title": f"{title[0].upper()}{title[1:]}",
            "neighbours": [] if data in seen else _neighbours(result, task),
        }
        if isinstance(result, RetrievalResult):
            values["retrieved"] = _retrieved(result, task)
        else:
            values |= _classification(result, task, name)
        found.append(values)
        seen.add(data)
    return found


def _classification(result: Classification, task: Task, name: str) -> dict[str, Any]:
    rows = [{"number": i} | row for i, row in enumerate(result.per_class(), start=1)]
    ranked = sorted(
        (row for row in rows if row["images"]), key=lambda row: (-row["top1"], row["number"])
    )
    has_extremes = len(ranked) > 2 * EXTREMES
    return {
        "retrieved": None,
        "confusion": _confusion(result, name),
        "confused": _confused_pairs(result, task),
        "best": ranked[:EXTREMES] if has_extremes else ranked,
        "worst": ranked[: -EXTREMES - 1 : -1] if has_extremes else [],
        "classes": rows,
    }


def _confusion(result: Classification, name: str) -> dict[str, Any]:
    """The confusion matrix; of many classes, those with most errors."""
    size = len(result.classes)
    label, predicted, images = result.confused().numpy().T
    totals = np.bincount(label, weights=images, minlength=size).astype(int)
    chosen = np.arange(size)
    if size > MAX_MATRIX:
        wrong = np.where(label != predicted, images, 0)
        errors = sum(
            np.bincount(ends, weights=wrong, minlength=size) for ends in (label, predicted)
        )
        chosen = np.sort(np.argsort(-errors, kind="stable")[:MAX_MATRIX])
    is_shown = np.isin(label, chosen) & np.isin(predicted, chosen)
    counts = np.zeros((len(chosen), len(chosen)), int)
    rows, columns = (np.searchsorted(chosen, ends[is_shown]) for ends in (label, predicted))
    counts[rows, columns] = images[is_shown]
    names = [result.classes[i] for i in chosen.tolist()]
    figure = confusion_matrix(counts, totals[chosen], names, (chosen + 1).tolist())
    return {
        "chart": svg(figure, f"confusion matrix of {name}"),
        "size": len(chosen),
        "left_out": size - len(chosen),
        "width": f"{min(46, 9 + 1.6 * len(chosen)):.0f}",
    }


def _confused_pairs(result: Classification, task: Task) -> list[dict[str, Any]]:
    """The most frequent errors, each with up to three images and a correct prediction."""
    names = result.classes
    totals = torch.bincount(result.labels, minlength=len(names)).tolist()
    labels, best = result.labels, result.top_classes[:, 0]
    probabilities = result.top_probabilities[:, 0].tolist()
    found = []
    for label, predicted, images in result.most_confused(CONFUSED_PAIRS):
        wrong = ((labels == label) & (best == predicted)).nonzero()[:3, 0].tolist()
        right = ((labels == predicted) & (best == predicted)).nonzero()[:1, 0].tolist()
        tiles = [
            _tile(result, task, i, caption=f"probability {_number(probabilities[i], '.0%')}",
                  kind="wrong")
            for i in wrong
        ]  # fmt: skip
        tiles += [
            _tile(result, task, i, caption=f"correct: {names[predicted]}", kind="right")
            for i in right
        ]
        found.append(
            {
                "label": names[label],
                "predicted": names[predicted],
                "count": images,
                "total": totals[label],
                "tiles": tiles,
            }
        )
    return found


def _retrieved(result: RetrievalResult, task: Task) -> list[Tile]:
    """Images with the caption ranked first for each, errors before correct ones."""
    ranks = result.image_ranks
    wrong = (ranks > 1).nonzero()[:, 0].tolist()
    right = (ranks == 1).nonzero()[:, 0].tolist()
    tiles = []
    for i in [*_evenly(wrong, 8), *_evenly(right, 4)]:
        caption = f"“{shorten(result.captions[int(result.top_captions[i, 0])], 90)}”"
        rank = int(ranks[i])
        if rank > 1:
            caption += f" (own caption: rank {rank:,})"
        kind = "right" if rank == 1 else "wrong"
        tiles.append(_tile(result, task, i, caption=caption, kind=kind))
    return tiles


def _neighbours(result: Result, task: Task) -> list[list[Tile]]:
    """A few query images, each with its nearest images in feature space."""
    features = result.features
    if len(features) < 2:
        return []
    queries = _evenly(range(len(features)), QUERIES)
    scores = features[queries] @ features.T  # (Q, N)
    scores[torch.arange(len(queries)), queries] = -torch.inf
    best = scores.topk(min(NEIGHBOURS, len(features) - 1), dim=1)
    found = []
    for query, cosines, rows in zip(
        queries, best.values.tolist(), best.indices.tolist(), strict=True
    ):
        tiles = [_tile(result, task, query, title=_words(result, query))]
        for cosine, row in zip(cosines, rows, strict=True):
            kind = ""
            if isinstance(result, Classification):
                kind = "right" if result.labels[row] == result.labels[query] else "wrong"
            caption = f"{_number(cosine, '.2f')} {_words(result, row)}"
            tiles.append(_tile(result, task, row, caption=caption, kind=kind))
        found.append(tiles)
    return found


def _tile(
    result: Result, task: Task, row: int, *, title: str = "", caption: str = "", kind: str = ""
) -> Tile:
    """The image of a row of the result."""
    image = image_of(task, int(result.indices[row]))
    return tile(image, _words(result, row), title=title, caption=caption, kind=kind)


def _words(result: Result, row: int) -> str:
    """The class of an image, or its first caption."""
    if isinstance(result, Classification):
        return shorten(result.classes[int(result.labels[row])], 60)
    return shorten(result.captions[result.first_caption(row)], 60)


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "–"


def _evenly(rows: Sequence[int], number: int) -> list[int]:
    """At most `number` of the rows, evenly spaced."""
    if len(rows) <= number:
        return list(rows)
    return [rows[i * len(rows) // number] for i in range(number)]
