"""What `leanclip compare` leaves: compare.json, compare.html, and changed.png."""

import json
from collections.abc import Sequence
from pathlib import Path

from leanclip.evaluation import Task
from leanclip.evaluation.compare import Change, Comparison, points
from leanclip.evaluation.retention import HEADLINES
from leanclip.evaluation.retrieval import WAYS
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
from leanclip.report.report_page import called, say

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


def _write_page(path: Path, found: Comparison, tasks: Sequence[Task]) -> None:
    rows = [
        [
            called(one.name),
            say(one.name, one.first),
            say(one.name, one.second),
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
            *(tag("p", words) for words in found.sentences()),
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
                    parts.append(_changes(f"{called(name)}: {title}", kind, some, task))
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
