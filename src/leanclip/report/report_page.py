"""The report as one page, `report.html`: what was measured, and what it looks like.

Report, metrics.jsonl -> sections (of results: report_results.py) -> page
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from leanclip.data.skipped import SkipTracker
from leanclip.evaluation.classification import Classification
from leanclip.evaluation.results import Report, sample_note
from leanclip.evaluation.retention import PREFIX
from leanclip.io.files import read_metrics
from leanclip.report.page import (
    Html,
    Points,
    bar,
    heat,
    line_chart,
    section,
    shortened,
    table,
    tag,
    thumbnail,
    write_page,
)
from leanclip.report.results import class_table, confusion_matrix, mistakes, neighbours, retrieved

FILE = "report.html"
HEADLINES = 4  # figures that are shown large
NOT_SHARES = ("_rank", "_size")  # ends of the names of figures that are no shares
SKIPPED = 20  # samples named on the page; report.json names all

OF_CLASSES = {"zeroshot": "zero-shot", "linear_probe": "linear probe", "knn": "k-NN"}
NAMES = {
    "image_to_text_R@1": "image to text recall@1",
    "image_to_text_R@5": "image to text recall@5",
    "image_to_text_R@10": "image to text recall@10",
    "image_to_text_median_rank": "image to text median rank",
    "text_to_image_R@1": "text to image recall@1",
    "text_to_image_R@5": "text to image recall@5",
    "text_to_image_R@10": "text to image recall@10",
    "text_to_image_median_rank": "text to image median rank",
    "calibrated_ece_before": "calibration error before calibration",
    "calibrated_ece": "calibration error after calibration",
    "calibrated_coverage": "coverage of the sets",
    "calibrated_set_size": "classes in a set, mean",
    "calibrated_none": "called none of the classes",
}
KINDS = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class",
    "ece": "calibration error",
}
FIRST = ("zeroshot_top1", "image_to_text_R@1", "text_to_image_R@1", "zeroshot_mean_per_class",
         "linear_probe_top1", "knn_top1")  # fmt: skip


def write_report_page(folder: Path, report: Report, skipped: SkipTracker | None = None) -> Path:
    """Write `report.html` into an existing folder, which may be a run's.

    `skipped` are the samples that training could not use.
    """
    title = f"leanclip report: {Path(report.source or folder).name}"
    parts = [
        _head(report, title),
        _figures(report),
        _curves(read_metrics(folder) or read_metrics(Path(report.source))),
        *_tasks(report),
        _similarity(report),
        _provenance(report),
        _skipped(report, skipped),
    ]
    write_page(folder / FILE, title, [part for part in parts if part])
    return folder / FILE


def format_metric(name: str, value: float) -> str:
    """A figure as people write it: a percentage, or a rank; of a broken model it may be none."""
    if not math.isfinite(value):
        return "no number"
    return f"{value:,.4g}" if name.endswith(NOT_SHARES) else f"{value:.1%}"


def metric_label(name: str) -> str:
    """What people call a figure."""
    if name.startswith(PREFIX):
        return f"retention: {metric_label(name.removeprefix(PREFIX))}"
    for start, words in OF_CLASSES.items():
        if name.startswith(f"{start}_") and name.removeprefix(f"{start}_") in KINDS:
            return f"{words} {KINDS[name.removeprefix(f'{start}_')]}"
    return NAMES.get(name, name.replace("_", " "))


def headlines(report: Report) -> str:
    """The first figures with their intervals, in a line."""
    found = []
    for name in _chosen(report)[:2]:
        interval = report.intervals.get(name)
        between = (
            f" ({' to '.join(format_metric(name, end) for end in interval)})" if interval else ""
        )
        found.append(f"{metric_label(name)} {format_metric(name, report.metrics[name])}{between}")
    return ", ".join(found)


def _chosen(report: Report) -> list[str]:
    """The names of figures, those that are looked at first in front."""
    first = [name for name in FIRST if name in report.metrics]
    return [*first, *(name for name in report.metrics if name not in first)]


def _head(report: Report, title: str) -> Html:
    cards = []
    for name in _chosen(report)[:HEADLINES]:
        interval = report.intervals.get(name)
        between = f"95%: {_between(name, interval)}" if interval else ""
        value = tag("b", format_metric(name, report.metrics[name]))
        cards.append(tag("div", tag("span", metric_label(name)), value, tag("span", between),
                         class_="card"))  # fmt: skip
    sentences = [tag("p", sentence) for sentence in report.sentences]
    return tag("header", tag("h1", title), tag("div", cards, class_="cards"), sentences)


def _between(name: str, interval: Sequence[float]) -> str:
    return " – ".join(format_metric(name, value) for value in interval)


def _figures(report: Report) -> Html:
    rows = []
    has_before = bool(report.before)
    for name, value in report.metrics.items():
        interval = report.intervals.get(name)
        low, high = interval or (None, None)
        is_share = 0 <= value <= 1 and not name.endswith(NOT_SHARES)
        row: list[str] = [
            tag("span", metric_label(name), bar(value, low=low, high=high) if is_share else ""),
            format_metric(name, value),
            _between(name, interval) if interval else "",
        ]
        if has_before:
            row.insert(1, format_metric(name, report.before[name]) if name in report.before else "")
        rows.append(row)
    heads = ["figure", *(["before"] if has_before else []), "value", "95% interval"]
    note = tag(
        "p",
        "An interval is where the figure would be for 95 of 100 draws of as many samples of the "
        "same kind (bootstrap). It says nothing of samples of other kinds.",
        class_="soft",
    )
    numbers = range(1, len(heads))
    return section("All figures", table(heads, rows, numbers=list(numbers)), note)


def _curves(lines: Sequence[Mapping[str, float]]) -> Html | str:
    """Loss, rate and temperature by step, and evaluations; nothing where nothing was trained."""

    def points(name: str) -> Points:
        return [(line["step"], line[name]) for line in lines if name in line]

    charts = {
        "loss": {"": "train/loss"},
        "learning rate": {"": "train/lr"},
        "logit scale": {"": "train/logit_scale"},
        "evaluation": {
            metric_label(name.removeprefix("val/")): name
            for name in sorted({name for line in lines for name in line})
            if name.startswith(("val/", PREFIX)) and name.endswith(("_top1", "_R@1"))
        },
    }
    drawn = []
    for title, names in charts.items():
        series = {key: points(name) for key, name in names.items() if len(points(name)) > 1}
        if series:
            drawn.append(line_chart(title, series))
    return section("Training", tag("div", drawn, class_="charts")) if drawn else ""


def _tasks(report: Report) -> list[Html]:
    """A section for each task; neighbours once for each data set."""
    sections, seen = [], set()
    for name, result in report.results.items():
        task, data = report.tasks[name], report.data[name]["sha256"]
        if isinstance(result, Classification):
            parts = [confusion_matrix(result), mistakes(result, task), class_table(result)]
        else:
            parts = [retrieved(result, task)]
        if data not in seen:
            parts.append(neighbours(result, task))
        seen.add(data)
        words = f"{name.replace('_', ' ').replace('/', ', ')}: {task.data.root}"
        sections.append(section(f"{words[0].upper()}{words[1:]}", *parts))
    return sections


def _similarity(report: Report) -> Html | str:
    if not report.examples:
        return ""
    images, texts = zip(*report.examples, strict=True)
    pictures = [thumbnail(image, text) for image, text in zip(images, texts, strict=True)]
    words = "Cosines of images and texts. The diagonal is of what belongs together."
    return section(
        "Similarity of a sample",
        tag("p", words, class_="soft"),
        heat(pictures, texts, report.similarity.numpy()),
    )


def _provenance(report: Report) -> Html:
    facts = report.facts()
    parts = [_hashed("weights", report.source, report.weights)]
    for name, data in report.data.items():
        where = f"{data['format']}:{data['root']}" + (f", {data['split']}" if data["split"] else "")
        words = f"{where}, {data['samples']:,} images. {sample_note(data)}"
        parts.append(_hashed(name.replace("_", " "), words, data["sha256"]))
    if report.command:
        parts += [tag("h3", "The same again"), tag("pre", report.command)]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    parts.append(tag("p", f"Made with {versions}.", class_="soft"))
    return section("Where it comes from", *parts)


def _hashed(name: str, words: str, sha256: str) -> Html:
    return tag("p", tag("b", name), f" {words}", tag("br"), "SHA-256 ", tag("code", sha256))


def _skipped(report: Report, skipped: SkipTracker | None) -> Html | str:
    """What could not be used, in evaluation and in training; nothing where all could."""
    parts = []
    if report.bad:
        chosen = list(report.bad.items())[:SKIPPED]
        parts.append(tag("p", f"Evaluation could not use {len(report.bad):,}."))
        parts.append(table(["sample", "why"], [[id, shortened(why)] for id, why in chosen]))
        if len(report.bad) > SKIPPED:
            parts.append(tag("p", "report.json names all of them.", class_="soft"))
    if skipped is not None and skipped.found:
        parts.append(tag("p", f"Training could not use {skipped.summary()}: skipped.jsonl."))
    return section("Skipped samples", *parts) if parts else ""
