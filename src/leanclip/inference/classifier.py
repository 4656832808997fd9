"""Labels as a classifier, and what it says of images.

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
from leanclip.evaluation.classification import Prediction

log = logging.getLogger("leanclip")


@dataclass(frozen=True)
class RankedItem:
    """An image or a text, with its similarity to a query."""

    index: int  # in the given sequence
    item: Any  # as given: a text, a path, ...
    similarity: float  # cosine


@dataclass(frozen=True)
class Classifier:
    """A unit vector for each label, to compare with images; from `InferenceModel.classifier`."""

    labels: tuple[str, ...]
    weights: torch.Tensor  # (C, E) float32, unit, on the CPU
    logit_scale: float  # the factor on cosines before the softmax
    calibration: Calibration | None = None  # of these weights, labels and templates


def predictions(
    classifier: Classifier, features: torch.Tensor, top: int | None = None
) -> list[list[Prediction]]:
    """The labels of each image by unit features (N, E), the most probable first.

    Of an image that a calibration finds to be none of the labels it is an empty list.
    """
    similarity = features @ classifier.weights.T  # (N, C)
    logits = classifier.logit_scale * similarity
    calibration = classifier.calibration
    if calibration is None:
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


def check_labels(labels: Sequence[str]) -> list[str]:
    """Labels without white space around them; one that is given twice is warned of.

    Raises:
        DataError: fewer than two different ones, or an empty one.
    """
    names = [label.strip() for label in check_texts(labels, what="label")]
    if "" in names:
        raise DataError(f"labels: label {names.index('')} is empty; write a word there, or drop it")
    times = Counter(names)
    if len(times) < 2:
        raise DataError(
            f"labels: found {len(times)}; give two or more to choose from, or use `similarity`, "
            f"as one label alone always has the probability 1"
        )
    name, count = times.most_common(1)[0]
    if count > 1:  # as ImageNet's own list has two
        log.warning(
            "labels: %r is given %d times, and its probability is divided among them", name, count
        )
    return names


def read_labels(file: str | Path) -> list[str]:
    """A label a line.

    Raises:
        DataError: there is no such file, or it does not hold such lines.
    """
    try:
        content = Path(file).read_bytes()
    except (OSError, ValueError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"{error}"
        raise DataError(
            f"labels: {str(file)[:80]}: {reason}; give a list of words, or a file with one a line"
        ) from None
    return list(class_file_in(content, where=str(file)).names)


def check_texts(texts: str | Sequence[str], *, what: str = "text") -> list[str]:
    """A list of texts; one text is a list of one.

    Raises:
        DataError: something is no text.
    """
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Sequence) or isinstance(texts, bytes):
        try:
            texts = list(texts)
        except TypeError:
            raise DataError(f"{what}s: found {texts!r}; give a list of strings") from None
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            found = type(text).__name__
            raise DataError(f"{what}s: {what} {number} is of type {found}; give strings")
    return list(texts)
