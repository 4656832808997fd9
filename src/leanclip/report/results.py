"""What a task's result looks like on a page: mistakes, classes, what was found, neighbours.

Shapes: N images, C classes, E embedding, Q queries.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from leanclip.evaluation.classification import Classification
from leanclip.evaluation.retrieval import RetrievalResult
from leanclip.evaluation.tasks import Task
from leanclip.report.page import (
    Html,
    bar,
    figure,
    gallery,
    matrix,
    shortened,
    table,
    tag,
    thumbnail,
)

MATRIX = 40  # classes of a confusion matrix that is shown whole
CONFUSED = 6  # pairs of classes shown with images
EXTREMES = 8  # best classes, and worst
QUERIES = 6  # images whose neighbours are shown
NEIGHBOURS = 5


def confusion_matrix(result: Classification) -> list[Html]:
    """The matrix, of the classes with most mistakes where there are many."""
    names, size = result.classes, len(result.classes)
    label, other, images = result.confused().numpy().T
    totals = np.bincount(label, weights=images, minlength=size).astype(int)
    shown = np.arange(size)
    words = "Rows: what it is. Columns: what it was said to be. "
    if size > MATRIX:
        wrong = np.where(label != other, images, 0)
        mistakes = sum(np.bincount(ends, weights=wrong, minlength=size) for ends in (label, other))
        shown = np.sort(np.argsort(-mistakes, kind="stable")[:MATRIX])
        words += f"Of {size} classes the {MATRIX} with most mistakes. "
    words += "Numbers are those of the table of classes below."
    is_shown = np.isin(label, shown) & np.isin(other, shown)
    counts = np.zeros((len(shown), len(shown)), int)
    rows, columns = (np.searchsorted(shown, ends[is_shown]) for ends in (label, other))
    counts[rows, columns] = images[is_shown]
    return [
        tag("h3", "Confusion matrix"),
        tag("p", words, class_="soft"),
        matrix(
            counts,
            totals[shown],
            [names[i] for i in shown.tolist()],
            [str(i + 1) for i in shown.tolist()],
        ),
    ]


def mistakes(result: Classification, task: Task) -> list[Html]:
    """The classes that are most often taken for each other, as images."""
    names = result.classes
    totals = torch.bincount(result.labels, minlength=len(names)).tolist()
    labels, said = result.labels, result.top_classes[:, 0]
    shares = result.top_probabilities[:, 0].tolist()
    parts = []
    for label, other, count in result.most_confused(CONFUSED):
        rows = ((labels == label) & (said == other)).nonzero()[:3, 0].tolist()
        right = ((labels == other) & (said == other)).nonzero()[:1, 0].tolist()
        figures = [
            figure(_picture(result, task, i), f"said with {_share(shares[i])}", kind="wrong")
            for i in rows
        ]
        figures += [
            figure(_picture(result, task, i), f"right: {names[other]}", kind="right") for i in right
        ]
        sentence = tag("p", tag("b", names[label]), " taken for ", tag("b", names[other]),
                       f": {count} of {totals[label]}")  # fmt: skip
        parts.append(tag("div", sentence, gallery(figures)))
    if not parts:
        return [tag("p", "No image was taken for another class.")]
    return [tag("h3", "Most confused, with images"), tag("div", parts, class_="two")]


def class_table(result: Classification) -> list[Html]:
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


def retrieved(result: RetrievalResult, task: Task) -> list[Html]:
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


def neighbours(result: Classification | RetrievalResult, task: Task) -> list[Html]:
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
            words = f"{_cosine(value)} {_words(result, row)}"
            figures.append(figure(_picture(result, task, row), words, kind=kind))
        parts.append(gallery(figures))
    return parts


def _picture(result: Classification | RetrievalResult, task: Task, row: int) -> Html:
    """The image of a row of the result."""
    return thumbnail(task.image(int(result.indices[row])), _words(result, row))


def _words(result: Classification | RetrievalResult, row: int) -> str:
    """The class of an image, or its first caption."""
    if isinstance(result, Classification):
        return shortened(result.classes[int(result.labels[row])], 60)
    first = int((result.owners == row).nonzero()[0, 0])
    return shortened(result.captions[first], 60)


def _share(value: float) -> str:
    return f"{value:.0%}" if math.isfinite(value) else "no number"


def _cosine(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "–"


def _spread(rows: Sequence[int], count: int) -> list[int]:
    """So many of the rows, evenly."""
    if len(rows) <= count:
        return list(rows)
    return [rows[i * len(rows) // count] for i in range(count)]
