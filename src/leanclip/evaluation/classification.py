"""What a classifier predicted for each image, and metrics: accuracy, confusion, calibration error.

    scores (N, C), labels (N,) -> `classify`, row by row -> Classification -> metrics, intervals

Probabilities are a softmax over the classes, or a sigmoid of each class's own logit: those that a
model with a logit bias was trained for (SigLIP, arXiv 2303.15343), which need not add up to 1.

Ties: of classes with equal scores the lower label ranks first, as in a stable sort.

Shapes: N images, C classes, K top classes, R resamples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from leanclip.errors import ConfigError
from leanclip.evaluation.statistics import Interval, bootstrap

Probabilities = Literal["sigmoid", "softmax"]

TOP_K = 5  # classes kept per image
BINS = 15  # of confidence, as in Guo et al., arXiv 1706.04599


@dataclass(frozen=True)
class Classification:
    """The predictions for each image."""

    classes: Sequence[str]
    indices: torch.Tensor  # (N,) int64, of the images in their data set
    labels: torch.Tensor  # (N,) int64
    features: torch.Tensor  # (N, E), of unit length
    ranks: torch.Tensor  # (N,) int64, from 1, of the right class
    top_classes: torch.Tensor  # (N, K) int64, the highest first
    top_probabilities: torch.Tensor  # (N, K) float32

    def confusion(self) -> torch.Tensor:
        """(C, C) int64: images by true class (row) and predicted class (column)."""
        counts = torch.zeros(len(self.classes), len(self.classes), dtype=torch.int64)
        label, predicted, images = self.confused().unbind(dim=1)
        counts[label, predicted] = images
        return counts

    def confused(self) -> torch.Tensor:
        """The non-zero entries of the confusion matrix: rows of label, prediction, images."""
        size = len(self.classes)
        cells, images = (self.labels * size + self.top_classes[:, 0]).unique(return_counts=True)
        return torch.stack([cells // size, cells % size, images], dim=1)

    def most_confused(self, count: int = 20) -> list[tuple[int, int, int]]:
        """(label, prediction, images) of the most frequent errors."""
        cells = self.confused()
        wrong = cells[cells[:, 0] != cells[:, 1]]
        order = wrong[:, 2].argsort(descending=True, stable=True)[:count]
        return [(label, predicted, images) for label, predicted, images in wrong[order].tolist()]

    def per_class(self) -> list[dict[str, Any]]:
        """Images, accuracies (None without images) and predictions of each class."""
        size = len(self.classes)
        images = torch.bincount(self.labels, minlength=size).tolist()
        first, five = (
            torch.bincount(self.labels[self.ranks <= k], minlength=size).tolist() for k in (1, 5)
        )
        predicted = torch.bincount(self.top_classes[:, 0], minlength=size).tolist()
        return [
            {
                "name": name,
                "images": images[i],
                "top1": first[i] / images[i] if images[i] else None,
                "top5": five[i] / images[i] if images[i] else None,
                "predicted": predicted[i],  # images
            }
            for i, name in enumerate(self.classes)
        ]

    def metrics(self) -> dict[str, float]:
        """`top1`, `top5`, `mean_per_class` and `ece`."""
        images = torch.bincount(self.labels, minlength=len(self.classes)).double()
        right = torch.bincount(self.labels[self.ranks == 1], minlength=len(self.classes))
        return {
            "top1": (self.ranks == 1).double().mean().item(),
            "top5": (self.ranks <= 5).double().mean().item(),
            "mean_per_class": (right / images)[images > 0].mean().item(),
            "ece": calibration_error(self.top_probabilities[:, 0], self.ranks == 1),
        }

    def intervals(self) -> dict[str, Interval]:
        """Of the metrics except `ece`, whose resampled values are biased upwards."""
        ranks, labels, size = self.ranks.numpy(), self.labels.numpy(), len(self.classes)

        def measure(drawn: np.ndarray) -> dict[str, np.ndarray]:
            ranks_drawn = ranks[drawn]  # (R, N)
            right = ranks_drawn == 1
            return {
                "top1": right.mean(axis=1),
                "top5": (ranks_drawn <= 5).mean(axis=1),
                "mean_per_class": mean_per_class(right, labels[drawn], size),
            }

        return bootstrap(len(ranks), measure)


def classify(
    blocks: Iterator[torch.Tensor],
    labels: torch.Tensor,
    *,
    classes: Sequence[str],
    indices: torch.Tensor,
    features: torch.Tensor,
    logit_bias: float | None = None,
) -> Classification:
    """A classification by logits.

    Args:
        blocks: logits of the images, in order, (n, C) at a time.
        labels: (N,).
        classes: their names, by label.
        indices: of the images in their data set.
        features: of the images.
        logit_bias: probabilities are sigmoids of logits with this bias; None: a softmax.
    """
    size, count, first = len(labels), min(TOP_K, len(classes)), 0
    ranks = torch.empty(size, dtype=torch.int64)
    tops = torch.empty(size, count, dtype=torch.int64)
    probabilities = torch.empty(size, count)
    for scores in blocks:
        rows = slice(first, first + len(scores))
        ranks[rows] = rank_of(scores, labels[rows].to(scores.device)).cpu()
        top, where = _highest(scores, count)
        tops[rows] = where.cpu()
        if logit_bias is not None:
            probabilities[rows] = (top.float() + logit_bias).sigmoid().cpu()
        else:
            total = scores.float().logsumexp(dim=1, keepdim=True)
            probabilities[rows] = (top.float() - total).exp().cpu()
        first += len(scores)
    return Classification(classes, indices, labels, features, ranks, tops, probabilities)


def chosen_probabilities(choice: str | None, logit_bias: float | None) -> Probabilities:
    """The kind of probabilities: the given one; None: sigmoids if the model has a logit bias.

    Raises:
        ConfigError: there is no such kind, or the model has no bias for sigmoids.
    """
    match choice:
        case "softmax":
            return "softmax"
        case "sigmoid" if logit_bias is None:
            raise ConfigError(
                "probabilities: sigmoid needs a model with a logit bias (SigLIP), which this one "
                "does not have; use softmax"
            )
        case "sigmoid" | None:
            return "softmax" if logit_bias is None else "sigmoid"
    raise ConfigError(f"probabilities: should be sigmoid or softmax, found {choice}")


def mean_per_class(right: np.ndarray, labels: np.ndarray, size: int) -> np.ndarray:
    """The mean accuracy of the classes that occur, of `size`: right and labels (R, N) -> (R,)."""
    cells = labels + size * np.arange(len(labels))[:, None]
    counts, hits = (
        np.bincount(some.ravel(), minlength=size * len(labels)).reshape(-1, size)
        for some in (cells, cells[right])
    )
    return (hits / np.maximum(counts, 1)).sum(axis=1) / (counts > 0).sum(axis=1)


def rank_of(scores: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The rank, from 1, of `own` (B,) in a stable descending sort of each row of scores (B, C).

    NaN ranks above all, so that a broken model has the worst ranks.
    """
    value = scores.gather(1, own[:, None])  # (B, 1)
    is_earlier = torch.arange(scores.shape[1], device=scores.device) < own[:, None]  # (B, C)
    return (~(scores <= value) | (is_earlier & (scores == value))).sum(dim=1) + 1


def calibration_error(confidences: torch.Tensor, hits: torch.Tensor) -> float:
    """Expected calibration error: the mean distance between confidence and accuracy, by bin.

    Bins have equal width over (0, 1], include their upper edge, and are weighted by samples.
    """
    places = (confidences.double() * BINS).ceil().long().clamp(1, BINS) - 1
    gaps = torch.zeros(BINS, dtype=torch.float64)
    gaps.index_add_(0, places, hits.double() - confidences.double())
    return gaps.abs().sum().item() / len(hits)


def _highest(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest scores of each row and their classes; of equals the first."""
    top, where = scores.topk(count, dim=1)
    has_tie = (scores >= top[:, -1:]).sum(dim=1) > count
    has_tie |= (top[:, 1:] == top[:, :-1]).any(dim=1)
    for row in has_tie.nonzero()[:, 0]:  # topk promises no order of equals
        top[row], where[row] = (x[:count] for x in scores[row].sort(descending=True, stable=True))
    return top, where


class Prediction(NamedTuple):
    """A label for an image."""

    label: str
    probability: float  # a softmax over the labels given, or a sigmoid for this label alone
    similarity: float  # cosine
