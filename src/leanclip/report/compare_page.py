"""What `leanclip compare` leaves: compare.json, compare.html, and changed.png."""

import json
from collections.abc import Sequence
from pathlib import Path

from leanclip.evaluation import Task
from leanclip.evaluation.compare import Change, Comparison
from leanclip.evaluation.results import sample_note
from leanclip.evaluation.retention import HEADLINES
from leanclip.evaluation.retrieval import WAYS
from leanclip.evaluation.significance import McNemar
from leanclip.io.files import write_text
from leanclip.report.page import (
    Html,
    figure,
    gallery,
    section,
    shortened,
    table,
    tag,
    thumbnail,
    write_page,
)
from leanclip.report.plots import can_draw, image_grid
from leanclip.report.report_page import format_metric, metric_label

SHOWN = 24  # changed samples of a kind on the page
DRAWN = 12  # in the picture


def write_comparison(folder: Path, found: Comparison, tasks: Sequence[Task]) -> list[Path]:
    """Write compare.json, compare.html and, with matplotlib, changed.png; what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "compare.json", json.dumps(found.facts(), indent=1) + "\n")
    _write_page(folder / "compare.html", found, tasks)
    written = [folder / "compare.json", folder / "compare.html"]
    drawn = []
    for task in tasks:
        name = HEADLINES[task.name]
        for letter, changes in (("B", found.better), ("A", found.worse)):
            for one in changes[name][:DRAWN]:
                wrong = f"A: {one.first}" if letter == "B" else f"B: {one.second}"
                words = (
                    f"only {letter} is right: {shortened(one.truth, 60)} ({shortened(wrong, 60)})"
                )
                drawn.append((task, one, words))
    images = [(task.image(one.index), words) for task, one, words in drawn]
    if images and can_draw():
        pictures, titles = zip(*images, strict=True)
        image_grid(pictures, titles, folder / "changed.png")
        written.append(folder / "changed.png")
    return written


def points(difference: float) -> str:
    """A difference of shares in percentage points."""
    return f"{100 * difference:+.1f}"


def sentence(name: str, test: McNemar) -> str:
    """A test in words."""
    p = f"p = {test.p:.2g}" if test.p >= 1e-4 else "p < 0.0001"
    verdict = (
        "more than luck would explain (at 5%)" if test.p < 0.05 else "it could be luck (at 5%)"
    )
    return (
        f"{metric_label(name)}: B is right on {test.better:,} where A is wrong, and wrong on "
        f"{test.worse:,} where A is right; {p} ({test.method}): {verdict}."
    )


def comparison_text(found: Comparison) -> str:
    """The comparison as lines for a terminal."""
    lines = [f"A: {found.names[0]}", f"B: {found.names[1]}"]
    width = max((len(metric_label(one.name)) for one in found.figures), default=0)
    for one in found.figures:
        low, high = one.interval
        lines.append(
            f"{metric_label(one.name):<{width}}  A {one.first:>6.1%}  B {one.second:>6.1%}  "
            f"B - A {points(one.difference)} (95%: {points(low)} to {points(high)})"
        )
    return "\n".join([*lines, *comparison_notes(found)])


def comparison_notes(found: Comparison) -> list[str]:
    """The tests in words, and what was measured where it is a sample."""
    notes = map(sample_note, found.reports[0].data.values())
    tests = [sentence(name, test) for name, test in found.tests.items()]
    return [*tests, *dict.fromkeys(note for note in notes if note)]


def _write_page(path: Path, found: Comparison, tasks: Sequence[Task]) -> None:
    rows = [
        [
            metric_label(one.name),
            format_metric(one.name, one.first),
            format_metric(one.name, one.second),
            points(one.difference),
            f"{points(one.interval[0])} to {points(one.interval[1])}",
        ]
        for one in found.figures
    ]
    heads = ["figure", "A", "B", "B − A", "95% interval"]
    parts: list[Html] = [
        tag("h1", "Two models on the same samples"),
        *(
            tag("p", tag("b", letter), f" {name} ", tag("br"), "SHA-256 ",
                tag("code", report.weights))
            for letter, name, report in zip("AB", found.names, found.reports, strict=True)
        ),
        section(
            "Figures",
            table(heads, rows, numbers=range(1, 5)),
            tag("p", "Differences are in points, B less A; their interval is where they would "
                "be for 95 of 100 draws of as many samples, the same for both (paired "
                "bootstrap).", class_="soft"),
            *(tag("p", words) for words in comparison_notes(found)),
        ),
    ]  # fmt: skip
    for task in tasks:
        firsts = [f"{way}_R@1" for way in WAYS]
        for name in firsts if task.name == "retrieval" else [HEADLINES[task.name]]:
            for title, kind, some in (
                ("only B is right", "right", found.better[name]),
                ("only A is right", "wrong", found.worse[name]),
            ):
                if some:
                    parts.append(_changes(f"{metric_label(name)}: {title}", kind, some, task))
    write_page(path, "leanclip compare", *parts)


def _changes(title: str, kind: str, some: Sequence[Change], task: Task) -> Html:
    figures = []
    for one in some[:SHOWN]:
        words = [
            tag("b", shortened(one.truth, 60)),
            tag("br"),
            f"A: {shortened(one.first, 60)}",
            tag("br"),
            f"B: {shortened(one.second, 60)}",
        ]
        figures.append(figure(thumbnail(task.image(one.index), one.id), words, kind=kind))
    more = f"{len(some):,} samples; compare.json names all of them."
    return section(title, tag("p", more, class_="soft"), gallery(figures))
