"""The images that pages and pictures show of a report's results."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from leanclip.data.dataset import fill
from leanclip.errors import one_line
from leanclip.evaluation.results import Report
from leanclip.evaluation.retrieval import RetrievalResult
from leanclip.evaluation.tasks import Task
from leanclip.evaluation.zero_shot import ZeroShotResult
from leanclip.preprocess.images import warn_unreadable_once

MAX_EXAMPLES = 8  # in the similarity matrix
MAX_PREDICTIONS = 24


class Examples(NamedTuple):
    """Pairs of image and text, with the cosine similarities of all."""

    images: list[Path | bytes]
    texts: list[str]
    similarity: np.ndarray  # (texts, images)


def image_of(task: Task, index: int) -> Path | bytes:
    """The image of a sample; empty bytes, with a warning, if it cannot be read any more."""
    try:
        return task.dataset[index].image
    except Exception as error:  # of any library; the metrics are not to be lost with a picture
        warn_unreadable_once(f"{task.dataset.name(index)}: {one_line(error)}")
        return b""


def examples(report: Report) -> Examples | None:
    """The first pairs of the retrieval task, else an image and the prompt of the first classes."""
    for name, result in report.results.items():
        if name == "retrieval" and isinstance(result, RetrievalResult):
            rows = result.indices.argsort()[:MAX_EXAMPLES].tolist()
            captions = [result.first_caption(row) for row in rows]
            texts = [result.captions[caption] for caption in captions]
            text_features = result.text_features[captions]
        elif name == "zero_shot" and isinstance(result, ZeroShotResult):
            labels: list[int] = result.labels.tolist()
            in_order: list[int] = result.indices.argsort().tolist()
            first_rows = {labels[row]: row for row in reversed(in_order)}
            chosen = sorted(first_rows)[:MAX_EXAMPLES]
            rows = [first_rows[label] for label in chosen]
            texts = [fill(result.templates, result.classes[label])[0] for label in chosen]
            text_features = result.classifier[chosen]
        else:
            continue
        images = [image_of(report.tasks[name], int(result.indices[row])) for row in rows]
        return Examples(images, texts, (text_features @ result.features[rows].T).numpy())
    return None


def predictions(report: Report) -> list[tuple[Path | bytes, str, str]]:
    """Images of the zero-shot task, evenly spaced, with their predicted and true classes."""
    result = report.results.get("zero_shot")
    if not isinstance(result, ZeroShotResult):
        return []
    in_order: list[int] = result.indices.argsort().tolist()
    labels: list[int] = result.labels.tolist()
    predicted: list[int] = result.top_classes[:, 0].tolist()
    task, names = report.tasks["zero_shot"], result.classes
    return [
        (image_of(task, int(result.indices[row])), names[predicted[row]], names[labels[row]])
        for row in in_order[:: -(-len(labels) // MAX_PREDICTIONS)]
    ]
