"""Linear and k-NN probes of image features.

    features, labels -> logistic regression, its L2 strength chosen on a validation part -> scores
    features, labels -> the k nearest by cosine, their weighted votes                    -> scores

Shapes: N training images, M to classify, C classes, E embedding, K neighbours, B block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from leanclip.errors import DataError
from leanclip.evaluation.classification import Classification

TEMPERATURE = 0.07  # of the votes of neighbours, as in Wu et al., arXiv 1805.01978
VALIDATION_FRACTION = 0.2  # of each class, to choose the L2 strength on
MAX_VALIDATION_SHOTS = 4  # the same with few shots: images of a class
_ITERATIONS = 1000  # at most, of L-BFGS, as in CLIP's paper
_BLOCK = 1 << 22  # similarities at a time


class Labelled(NamedTuple):
    """Features and labels of images."""

    features: torch.Tensor  # (N, E) float32
    labels: torch.Tensor  # (N,) int64


class Linear(NamedTuple):
    """A linear classifier: scores are features @ weight.T + bias."""

    weight: torch.Tensor  # (C, E)
    bias: torch.Tensor  # (C,)


@dataclass(frozen=True)
class ProbeResult(Classification):
    """A probe's predictions, and what it was trained on."""

    learned: int  # images
    setting: float  # the L2 strength of a linear probe, the k of a k-NN probe


class Fitted(NamedTuple):
    """A linear probe."""

    linear: Linear
    strength: float
    learned: int  # images


def linear_probe(
    train: Labelled, validation: Labelled | None, classes: int, *, shots: int | None = None
) -> Fitted:
    """Choose the L2 strength on the validation part, then train on both, as in CLIP's paper.

    Without a validation part it is a fifth of each class. With `shots`, so many images of each
    class are drawn to train on, and at most four others to choose the strength on.

    Raises:
        DataError: no image is left to choose the strength on.
    """
    if shots is not None:
        drawn, rest = draw_per_class(train.labels, shots)
        pool = _rows(train, rest) if validation is None else validation
        tuning_part = _rows(pool, draw_per_class(pool.labels, min(shots, MAX_VALIDATION_SHOTS))[0])
        part = whole = _rows(train, drawn)
    elif validation is None:
        drawn, rest = draw_per_class(train.labels, VALIDATION_FRACTION)
        part, tuning_part, whole = _rows(train, rest), _rows(train, drawn), train
    else:
        part, tuning_part = train, validation
        whole = Labelled(*(torch.cat(pair) for pair in zip(train, validation, strict=True)))
    if not len(tuning_part.labels):
        raise DataError(
            "linear probe: no image is left to choose the L2 strength on; give fewer --shots, or "
            "a data set with more images per class"
        )
    strength = choose_strength(part, tuning_part, classes)[0]
    return Fitted(logistic_regression(whole, classes, strength), strength, len(whole.labels))


def _rows(some: Labelled, rows: torch.Tensor) -> Labelled:
    return Labelled(some.features[rows], some.labels[rows])


def logistic_regression(
    train: Labelled, classes: int, strength: float, start: Linear | None = None
) -> Linear:
    """The minimum of the summed cross-entropy + strength / 2 * the squared norm of the weights.

    By L-BFGS in float32 on the features' device, from `start`; the bias is not penalised. Classes
    without images get a score of -inf. scikit-learn's C is 1 / strength.
    """
    features, labels = train
    is_missing = torch.ones(classes, dtype=torch.bool, device=features.device)
    is_missing[labels.unique()] = False
    weight = features.new_zeros(classes, features.shape[1])
    bias = features.new_zeros(classes)
    if start is not None:
        weight.copy_(start.weight)
        bias.copy_(start.bias.masked_fill(is_missing, 0))
    weight.requires_grad_()
    bias.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_ITERATIONS,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = (features @ weight.T + bias).masked_fill(is_missing, -torch.inf)
        value = F.cross_entropy(logits, labels) + strength / 2 * weight.square().sum() / len(labels)
        value.backward()
        return value

    optimizer.step(loss)
    return Linear(weight.detach(), bias.detach().masked_fill(is_missing, -torch.inf))


def scores_of(linear: Linear, features: torch.Tensor) -> Iterator[torch.Tensor]:
    """Blocks (B, C) of the scores of features (M, E)."""
    for part in features.split(max(1, _BLOCK // len(linear.bias))):
        yield part.to(linear.weight.device) @ linear.weight.T + linear.bias


def choose_strength(
    train: Labelled, validation: Labelled, classes: int
) -> tuple[float, dict[float, float]]:
    """The best L2 strength on the validation part, and the accuracy of each that was tried.

    The sweep of CLIP's paper (arXiv 2103.00020, appendix A.3): of strengths from 1e-6 to 1e6,
    first seven two decades apart, then both sides of the best at half the distance, and so on to
    eight per decade. Of equals the strongest.
    """
    tried: dict[int, float] = {}  # accuracy by eighths of a decade
    start, best, step = None, 0, 16
    wanted = list(range(48, -49, -16))
    while step:
        for eighths in wanted:
            start = logistic_regression(train, classes, 10 ** (eighths / 8), start)
            scores = scores_of(start, validation.features)
            predicted = torch.cat([part.argmax(dim=1).cpu() for part in scores])
            tried[eighths] = (predicted == validation.labels.cpu()).double().mean().item()
        best = max(tried, key=lambda eighths: (tried[eighths], eighths))
        step //= 2
        around = (best + step, best - step)
        wanted = [eighths for eighths in around if abs(eighths) <= 48 and eighths not in tried]
    return 10 ** (best / 8), {10 ** (e / 8): value for e, value in tried.items()}


def neighbour_votes(
    train: Labelled, features: torch.Tensor, classes: int, k: int
) -> Iterator[torch.Tensor]:
    """Blocks (B, C) of the logarithm of each class's votes, by unit features (M, E).

    The k nearest by cosine vote for their class, each with exp(cosine / TEMPERATURE).
    """
    gallery, labels = train
    k = min(k, len(labels))
    for part in features.split(max(1, _BLOCK // len(labels))):
        nearest, where = (part.to(gallery.device) @ gallery.T).topk(k, dim=1)  # (B, K)
        weights = ((nearest - nearest[:, :1]) / TEMPERATURE).exp()
        votes = gallery.new_zeros(len(part), classes)
        yield votes.scatter_add_(1, labels[where], weights).log()


def draw_per_class(
    labels: torch.Tensor, count: int | float, *, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows drawn from each class, and the rest: `count` images, or a fraction of them (below 1).

    A fraction leaves at least one image of each class, and draws one if there are two.
    """
    rng = np.random.default_rng(seed)
    drawn, rest = ([np.empty(0, np.int64)] for _ in range(2))
    for label in labels.unique().tolist():
        rows = rng.permutation((labels == label).nonzero()[:, 0].numpy())
        size = count if count >= 1 else min(max(1, round(count * len(rows))), len(rows) - 1)
        drawn.append(rows[: int(size)])
        rest.append(rows[int(size) :])
    first, second = (torch.from_numpy(np.sort(np.concatenate(part))) for part in (drawn, rest))
    return first, second
