"""The files of `leanclip compare`: compare.json and compare.html."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leanclip.evaluation.compare import Change, Comparison
from leanclip.evaluation.retrieval import WAYS
from leanclip.evaluation.statistics import LEVEL, RESAMPLES
from leanclip.evaluation.tasks import HEADLINES, Task
from leanclip.io.files import write_text
from leanclip.report.page import Tile, shorten, tile, write_page
from leanclip.report.report_page import report_values
from leanclip.report.samples import image_of
from leanclip.report.text import (
    comparison_notes,
    count,
    format_metric,
    format_points,
    metric_label,
)

MAX_TILES = 24  # samples of a group


def write_comparison(folder: Path, found: Comparison, tasks: Sequence[Task]) -> list[Path]:
    """Write compare.json and compare.html into a folder; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "compare.json", json.dumps(_values(found), indent=1) + "\n")
    write_page(
        folder / "compare.html",
        "compare.html",
        title="leanclip compare",
        models=[
            (letter, name, report.weights)
            for letter, name, report in zip("AB", found.names, found.reports, strict=True)
        ],
        rows=[
            (
                metric_label(one.name),
                format_metric(one.name, one.first),
                format_metric(one.name, one.second),
                format_points(one.difference),
                " to ".join(map(format_points, one.interval)),
            )
            for one in found.differences
        ],
        notes=comparison_notes(found),
        groups=[group for task in tasks for group in _groups(found, task)],
    )
    return [folder / "compare.json", folder / "compare.html"]


def _values(found: Comparison) -> dict[str, Any]:
    """The content of compare.json."""
    return {
        "models": [
            {
                "source": name,
                "sha256": report.weights,
                "metrics": report_values(report)["metrics"],
            }
            for name, report in zip(found.names, found.reports, strict=True)
        ],
        "data": found.reports[0].data,
        "differences": {
            one.name: {
                "first": one.first,
                "second": one.second,
                "difference": one.difference,
                "interval": one.interval,
            }
            for one in found.differences
        },
        "interval_level": LEVEL,
        "resamples": RESAMPLES,
        "mcnemar": {name: vars(test) for name, test in found.tests.items()},
        "better": {name: [vars(one) for one in changes] for name, changes in found.better.items()},
        "worse": {name: [vars(one) for one in changes] for name, changes in found.worse.items()},
        "bad": found.reports[0].bad,
    }


def _groups(found: Comparison, task: Task) -> list[dict[str, Any]]:
    """The samples of a task that only one model got right, by metric and by model."""
    names = [HEADLINES[task.name]]
    if task.name == "retrieval":
        names = [f"{way}_R@1" for way in WAYS]
    groups = []
    for name in names:
        kinds = (("B", "right", found.better[name]), ("A", "wrong", found.worse[name]))
        groups += [
            {
                "title": f"{metric_label(name)}: only {letter} correct",
                "count": count(len(changes), "sample"),
                "tiles": [_tile(task, change, kind) for change in changes[:MAX_TILES]],
            }
            for letter, kind, changes in kinds
            if changes
        ]
    return groups


def _tile(task: Task, change: Change, kind: str) -> Tile:
    first, second = (shorten(" ".join(text.split()), 60) for text in (change.first, change.second))
    return tile(
        image_of(task, change.index),
        change.id,
        title=shorten(change.truth, 60),
        caption=f"A: {first}\nB: {second}",
        kind=kind,
    )
