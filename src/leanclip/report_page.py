"""The report as one page, `report.html`: what was measured, and what it looks like.

Report, metrics.jsonl -> sections -> page

Shapes: N images, C classes, E embedding.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from leanclip.data.skipped import BadSamples
from leanclip.errors import SampleError
from leanclip.evaluate.classification import Classification
from leanclip.evaluate.guard import PREFIX
from leanclip.evaluate.report import Report
from leanclip.evaluate.retrieval import RetrievalResult
from leanclip.evaluate.tasks import Task
from leanclip.page import (
    Html,
    Points,
    bar,
    figure,
    gallery,
    heat,
    line_chart,
    matrix,
    section,
    shortened,
    table,
    tag,
    thumbnail,
    write_page,
)
from leanclip.tracking import read_metrics

FILE = "report.html"
HEADLINES = 4  # figures that are shown large
MATRIX = 40  # classes of a confusion matrix that is shown whole
CONFUSED = 6  # pairs of classes shown with images
EXTREMES = 8  # best classes, and worst
QUERIES = 6  # images whose neighbours are shown
NEIGHBOURS = 5
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
log = logging.getLogger("leanclip")


def write_report_page(folder: Path, report: Report, skipped: BadSamples | None = None) -> Path:
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


def say(name: str, value: float) -> str:
    """A figure as people write it: a percentage, or a rank."""
    return f"{value:,.4g}" if name.endswith(NOT_SHARES) else f"{value:.1%}"


def called(name: str) -> str:
    """What people call a figure."""
    if name.startswith(PREFIX):
        return f"guard: {called(name.removeprefix(PREFIX))}"
    for start, words in OF_CLASSES.items():
        if name.startswith(f"{start}_") and name.removeprefix(f"{start}_") in KINDS:
            return f"{words} {KINDS[name.removeprefix(f'{start}_')]}"
    return NAMES.get(name, name.replace("_", " "))


def headlines(report: Report) -> str:
    """The first figures with their intervals, in a line."""
    found = []
    for name in _chosen(report)[:2]:
        interval = report.intervals.get(name)
        between = f" ({' to '.join(say(name, end) for end in interval)})" if interval else ""
        found.append(f"{called(name)} {say(name, report.metrics[name])}{between}")
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
        value = tag("b", say(name, report.metrics[name]))
        cards.append(tag("div", tag("span", called(name)), value, tag("span", between),
                         class_="card"))  # fmt: skip
    sentences = [tag("p", sentence) for sentence in report.sentences]
    return tag("header", tag("h1", title), tag("div", cards, class_="cards"), sentences)


def _between(name: str, interval: Sequence[float]) -> str:
    return " – ".join(say(name, value) for value in interval)


def _figures(report: Report) -> Html:
    rows = []
    has_before = bool(report.before)
    for name, value in report.metrics.items():
        interval = report.intervals.get(name)
        low, high = interval or (None, None)
        is_share = 0 <= value <= 1 and not name.endswith(NOT_SHARES)
        row: list[str] = [
            tag("span", called(name), bar(value, low=low, high=high) if is_share else ""),
            say(name, value),
            _between(name, interval) if interval else "",
        ]
        if has_before:
            row.insert(1, say(name, report.before[name]) if name in report.before else "")
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
            called(name.removeprefix("val/")): name
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
            parts = [_confusion(result, task), _classes(result)]
        else:
            parts = [_retrieved(result, task)]
        if data not in seen:
            parts.append(_neighbours(result, task))
        seen.add(data)
        words = f"{name.replace('_', ' ').replace('/', ', ')}: {task.data.root}"
        sections.append(section(f"{words[0].upper()}{words[1:]}", *parts))
    return sections


def _confusion(result: Classification, task: Task) -> list[Html]:
    """The matrix, of the classes with most mistakes if there are many, and mistakes as images."""
    counts, names = result.confusion().numpy(), result.classes
    wrong = counts - np.diag(np.diag(counts))
    shown = np.arange(len(names))
    words = "Rows: what it is. Columns: what it was said to be. "
    if len(names) > MATRIX:
        mistakes = wrong.sum(axis=0) + wrong.sum(axis=1)
        shown = np.sort(np.argsort(-mistakes, kind="stable")[:MATRIX])
        words += f"Of {len(names)} classes the {MATRIX} with most mistakes. "
    words += "Numbers are those of the table of classes below."
    parts = [
        tag("h3", "Confusion matrix"),
        tag("p", words, class_="soft"),
        matrix(
            counts[np.ix_(shown, shown)],
            [names[i] for i in shown.tolist()],
            [str(i + 1) for i in shown],
        ),
    ]
    pairs = result.most_confused(CONFUSED)
    if not pairs:
        return [*parts, tag("p", "No image was taken for another class.")]
    labels, said = result.labels, result.top_classes[:, 0]
    parts.append(tag("h3", "Most confused, with images"))
    shown_pairs = []
    for label, other, count in pairs:
        rows = ((labels == label) & (said == other)).nonzero()[:3, 0].tolist()
        right = ((labels == other) & (said == other)).nonzero()[:1, 0].tolist()
        shares = result.top_probabilities[:, 0]
        mistaken = [
            figure(_picture(result, task, i), f"said with {shares[i]:.0%}", kind="wrong")
            for i in rows
        ]
        example = [
            figure(_picture(result, task, i), f"right: {names[other]}", kind="right") for i in right
        ]
        sentence = tag("p", tag("b", names[label]), " taken for ", tag("b", names[other]),
                       f": {count} of {counts[label].sum()}")  # fmt: skip
        shown_pairs.append(tag("div", sentence, gallery([*mistaken, *example])))
    return [*parts, tag("div", shown_pairs, class_="two")]


def _classes(result: Classification) -> list[Html]:
    """The classes by their share of right answers: the best, the worst, and all."""
    rows = [(i, row) for i, row in enumerate(result.per_class(), start=1)]
    known = sorted((r for r in rows if r[1]["images"]), key=lambda r: (-r[1]["top1"], r[0]))

    def listed(chosen: Sequence[tuple[int, dict]]) -> Html:
        return table(
            ["", "class", "right", "images"],
            [
                [
                    str(i),
                    tag("span", row["name"], bar(row["top1"] or 0.0)),
                    "" if row["top1"] is None else f"{row['top1']:.1%}",
                    f"{row['images']:,}",
                ]
                for i, row in chosen
            ],
            numbers=[2, 3],
        )

    whole = tag("details", tag("summary", f"all {len(rows)} classes"), listed(rows))
    if len(known) <= 2 * EXTREMES:
        return [tag("h3", "Classes, the best first"), listed(known), whole]
    best = tag("div", tag("h3", "Best classes"), listed(known[:EXTREMES]))
    worst = tag("div", tag("h3", "Worst classes"), listed(known[: -EXTREMES - 1 : -1]))
    return [tag("div", best, worst, class_="two"), whole]


def _retrieved(result: RetrievalResult, task: Task) -> list[Html]:
    """Images with the caption that each found first, and mistakes before right ones."""
    ranks = result.image_ranks
    wrong = (ranks > 1).nonzero()[:, 0].tolist()
    right = (ranks == 1).nonzero()[:, 0].tolist()
    figures = []
    for i in [*_spread(wrong, 8), *_spread(right, 4)]:
        first = int(result.top_captions[i, 0])
        is_right = int(ranks[i]) == 1
        own = "" if is_right else f" Its own: place {int(ranks[i])}."
        words = f"“{shortened(result.captions[first], 90)}”{own}"
        figures.append(
            figure(_picture(result, task, i), words, kind="right" if is_right else "wrong")
        )
    return [tag("h3", "The caption that an image finds first"), gallery(figures)]


def _neighbours(result: Classification | RetrievalResult, task: Task) -> list[Html]:
    """For a few images, those nearest to them in feature space, without themselves."""
    features = result.features
    if len(features) < 2:
        return []
    queries = _spread(range(len(features)), QUERIES)
    scores = features[queries] @ features.T  # (Q, N)
    scores[torch.arange(len(queries)), queries] = -torch.inf
    best = scores.topk(min(NEIGHBOURS, len(features) - 1), dim=1)
    parts = [
        tag("h3", "Nearest images"),
        tag("p", "Each first image, and those nearest to it by cosine.", class_="soft"),
    ]
    for query, values, rows in zip(queries, best.values, best.indices.tolist(), strict=True):
        figures = [figure(_picture(result, task, query), tag("b", _words(result, query)))]
        for value, row in zip(values.tolist(), rows, strict=True):
            kind = None
            if isinstance(result, Classification):
                is_same = result.labels[row] == result.labels[query]
                kind = "right" if is_same else "wrong"
            words = f"{value:.2f} {_words(result, row)}"
            figures.append(figure(_picture(result, task, row), words, kind=kind))
        parts.append(gallery(figures))
    return parts


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
        where = f"{data['layout']}:{data['root']}" + (f", {data['split']}" if data["split"] else "")
        words = f"{where}, {data['samples']:,} images"
        parts.append(_hashed(name.replace("_", " "), words, data["sha256"]))
    if report.command:
        parts += [tag("h3", "The same again"), tag("pre", report.command)]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    parts.append(tag("p", f"Made with {versions}.", class_="soft"))
    return section("Where it comes from", *parts)


def _hashed(name: str, words: str, sha256: str) -> Html:
    return tag("p", tag("b", name), f" {words}", tag("br"), "SHA-256 ", tag("code", sha256))


def _skipped(report: Report, skipped: BadSamples | None) -> Html | str:
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


def _picture(result: Classification | RetrievalResult, task: Task, row: int) -> Html:
    """The image of a row of the result."""
    try:
        return thumbnail(task.dataset[int(result.indices[row])].image, _words(result, row))
    except SampleError:
        return thumbnail(b"")


def _words(result: Classification | RetrievalResult, row: int) -> str:
    """The class of an image, or its first caption."""
    if isinstance(result, Classification):
        return shortened(result.classes[int(result.labels[row])], 60)
    first = int((result.owners == row).nonzero()[0, 0])
    return shortened(result.captions[first], 60)


def _spread(rows: Sequence[int], count: int) -> list[int]:
    """So many of the rows, evenly."""
    if len(rows) <= count:
        return list(rows)
    return [rows[i * len(rows) // count] for i in range(count)]
