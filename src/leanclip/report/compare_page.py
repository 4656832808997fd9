"""The files of `leanclip compare`: compare.json, compare.html, and changed.png."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leanclip.evaluation.compare import Change, Comparison
from leanclip.evaluation.retrieval import WAYS
from leanclip.evaluation.statistics import LEVEL, RESAMPLES
from leanclip.evaluation.tasks import HEADLINES, Task
from leanclip.io.files import write_text
from leanclip.report.page import shorten, tile, write_page
from leanclip.report.plots import image_grid
from leanclip.report.report_page import report_values
from leanclip.report.samples import image_of
from leanclip.report.text import (
    comparison_notes,
    count,
    format_metric,
    format_points,
    metric_label,
)

MAX_TILES = 24  # changed samples of a kind on the page
MAX_DRAWN = 12  # in the picture


def write_comparison(folder: Path, found: Comparison, tasks: Sequence[Task]) -> list[Path]:
    """Write compare.json, compare.html and, where samples differ, changed.png; their paths."""
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
    written = [folder / "compare.json", folder / "compare.html"]
    if changed := [drawn for task in tasks for drawn in _drawn(found, task)]:
        images, titles = zip(*changed, strict=True)
        image_grid(images, titles, folder / "changed.png")
        written.append(folder / "changed.png")
    return written


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
    ways = [f"{way}_R@1" for way in WAYS]
    groups = []
    for name in ways if task.name == "retrieval" else [HEADLINES[task.name]]:
        for letter, kind, changes in (
            ("B", "right", found.better[name]),
            ("A", "wrong", found.worse[name]),
        ):
            if changes:
                groups.append(
                    {
                        "title": f"{metric_label(name)}: only {letter} correct",
                        "count": count(len(changes), "sample"),
                        "tiles": [
                            tile(
                                image_of(task, one.index),
                                one.id,
                                title=shorten(one.truth, 60),
                                caption=f"A: {_line(one.first)}\nB: {_line(one.second)}",
                                kind=kind,
                            )
                            for one in changes[:MAX_TILES]
                        ],
                    }
                )
    return groups


def _line(text: str) -> str:
    """The start of a text, on one line."""
    return shorten(" ".join(text.split()), 60)


def _drawn(found: Comparison, task: Task) -> list[tuple[Any, str]]:
    """Images of the changed samples with their captions, for the picture."""

    def caption(one: Change, letter: str, wrong: str) -> str:
        return f"only {letter} correct: {shorten(one.truth, 60)} ({shorten(wrong, 60)})"

    name = HEADLINES[task.name]
    better = [(one, caption(one, "B", f"A: {one.first}")) for one in found.better[name][:MAX_DRAWN]]
    worse = [(one, caption(one, "A", f"B: {one.second}")) for one in found.worse[name][:MAX_DRAWN]]
    return [(image_of(task, one.index), words) for one, words in [*better, *worse]]
