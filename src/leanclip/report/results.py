"""What the report page shows of a task's result: errors, classes, captions, nearest images.

Shapes: N images, C classes, E embedding, Q queries.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from leanclip.evaluation.classification import Classification
from leanclip.evaluation.results import Result
from leanclip.evaluation.retrieval import RetrievalResult
from leanclip.evaluation.tasks import Task
from leanclip.report import plots
from leanclip.report.page import Tile, shorten, svg, tile

MAX_MATRIX = 40  # classes of a confusion matrix
CONFUSED = 6  # pairs of classes shown with images
EXTREMES = 8  # best classes, and worst
QUERIES = 6  # images whose nearest images are shown
NEIGHBOURS = 5


def task_values(name: str, result: Result, task: Task, *, with_neighbours: bool) -> dict[str, Any]:
    """The values of a task's section in templates/report.html; `name` is the task's."""
    neighbours = _neighbours(result, task) if with_neighbours else []
    if isinstance(result, RetrievalResult):
        return {"retrieved": _retrieved(result, task), "neighbours": neighbours}
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
        "neighbours": neighbours,
    }


def _confusion(result: Classification, name: str) -> dict[str, Any]:
    """The confusion matrix, of the classes with most errors where there are many."""
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
    figure = plots.confusion_matrix(counts, totals[chosen], names, (chosen + 1).tolist())
    return {
        "chart": svg(figure, f"confusion matrix of {name}"),
        "size": len(chosen),
        "left_out": size - len(chosen),
        "width": f"{min(46, 9 + 1.6 * len(chosen)):.0f}",
    }


def _confused_pairs(result: Classification, task: Task) -> list[dict[str, Any]]:
    """The most frequent errors, each with up to three images and one that was predicted right."""
    names = result.classes
    totals = torch.bincount(result.labels, minlength=len(names)).tolist()
    labels, best = result.labels, result.top_classes[:, 0]
    probabilities = result.top_probabilities[:, 0].tolist()
    found = []
    for label, predicted, images in result.most_confused(CONFUSED):
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
    """For a few query images the query and its nearest images in feature space."""
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
    image = task.image(int(result.indices[row]))
    return tile(image, _words(result, row), title=title, caption=caption, kind=kind)


def _words(result: Result, row: int) -> str:
    """The class of an image, or its first caption."""
    if isinstance(result, Classification):
        return shorten(result.classes[int(result.labels[row])], 60)
    first = int((result.owners == row).nonzero()[0, 0])
    return shorten(result.captions[first], 60)


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "–"


def _evenly(rows: Sequence[int], number: int) -> list[int]:
    """At most `number` of the rows, evenly spaced."""
    if len(rows) <= number:
        return list(rows)
    return [rows[i * len(rows) // number] for i in range(number)]
