"""Labels as a zero-shot classifier, and its predictions.

Shapes: N images, C labels, E embedding.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from leanclip.data.dataset import class_file_in
from leanclip.errors import DataError
from leanclip.evaluation import Calibration
from leanclip.evaluation.classification import Prediction, Probabilities

log = logging.getLogger("leanclip")


@dataclass(frozen=True)
class RankedItem:
    """An image or a text, with its similarity to a query."""

    index: int  # in the given sequence
    item: Any  # as given: a text, a path, ...
    similarity: float  # cosine


@dataclass(frozen=True)
class Classifier:
    """A unit vector for each label; made by `InferenceModel.classifier`."""

    labels: tuple[str, ...]
    weights: torch.Tensor  # (C, E) float32, on the CPU
    logit_scale: float  # multiplies cosines
    calibration: Calibration | None = None  # of these weights, labels and templates
    logit_bias: float | None = None  # added to them in sigmoids
    probabilities: Probabilities = "softmax"  # without a calibration


def predictions(
    classifier: Classifier, features: torch.Tensor, top: int | None = None
) -> list[list[Prediction]]:
    """The `top` labels of each image by unit features (N, E), the most probable first.

    With a calibration, an image that matches none of the labels has an empty list.
    """
    similarity = features @ classifier.weights.T  # (N, C)
    logits = classifier.logit_scale * similarity
    calibration = classifier.calibration
    if calibration is None and classifier.probabilities == "sigmoid":
        probability = (logits + (classifier.logit_bias or 0)).sigmoid()
        is_none = torch.zeros(len(features))
    elif calibration is None:
        probability, is_none = logits.softmax(dim=1), torch.zeros(len(features))
    else:
        probability, is_none = calibration.probabilities(logits), calibration.is_none(logits)
    count = min(top or len(classifier.labels), len(classifier.labels))
    best = similarity.topk(count, dim=1).indices  # (N, top)
    rows = zip(
        best.tolist(),
        probability.gather(1, best).tolist(),
        similarity.gather(1, best).tolist(),
        is_none.tolist(),
        strict=True,
    )
    return [
        []
        if none
        else [Prediction(classifier.labels[i], p, s) for i, p, s in zip(*row, strict=True)]
        for *row, none in rows
    ]


def check_labels(labels: Sequence[str], *, at_least: int = 2) -> list[str]:
    """Labels without surrounding white space; duplicates cause a warning.

    Args:
        labels: their names.
        at_least: different labels: two for a softmax, one for sigmoids.

    Raises:
        DataError: there are fewer different labels, or an empty one.
    """
    names = [label.strip() for label in check_texts(labels, what="label")]
    if "" in names:
        raise DataError(f"labels: label {names.index('')} is empty; give it a name, or remove it")
    counts = Counter(names)
    if not counts and at_least < 2:
        raise DataError("labels: found 0; give at least one")
    if len(counts) < at_least:
        raise DataError(
            f"labels: found {len(counts)}; give two or more to choose from, or use `similarity`, "
            f"because the probability of a single label is always 1"
        )
    name, count = counts.most_common(1)[0]
    if count > 1 and at_least > 1:  # the list of ImageNet has such duplicates
        log.warning("labels: %r occurs %d times; its probability is split", name, count)
    return names


def read_labels(file: str | Path) -> list[str]:
    """The labels in a text file, one per line.

    Raises:
        DataError: there is no such file, or it is not a text with one label per line.
    """
    try:
        content = Path(file).read_bytes()
    except (OSError, ValueError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"{error}"
        raise DataError(
            f"labels: {str(file)[:80]}: {reason}; give a list, or a file with one label per line"
        ) from None
    return list(class_file_in(content, where=str(file)).names)


def check_texts(texts: str | Sequence[str], *, what: str = "text") -> list[str]:
    """A list of texts; a single text becomes a list of one.

    Raises:
        DataError: an item is not a string.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            found = type(text).__name__
            raise DataError(f"{what}s: {what} {number} is of type {found}; give strings")
    return texts
