"""Probes: what the image features alone tell of classes, with labels to learn from.

    features, labels -> logistic regression, its L2 strength chosen on a validation part -> scores
    features, labels -> the k nearest by cosine, their weighted votes                     -> scores

Shapes: N images to learn from, M to classify, C classes, E embedding, K neighbours, B of a block.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from leanclip.errors import DataError
from leanclip.evaluation.classification import Classification

TEMPERATURE = 0.07  # of the votes of neighbours, as in Wu et al., arXiv 1805.01978
HELD_OUT = 0.2  # of each class, to choose the L2 strength on
FEW = 4  # images of a class for that, when few are learned from
_ITERATIONS = 1000  # the most of L-BFGS, as in CLIP's paper
_BLOCK = 1 << 22  # similarities at a time


class Labelled(NamedTuple):
    """Features of images of which the class is known."""

    features: torch.Tensor  # (N, E) float32
    labels: torch.Tensor  # (N,) int64


class Linear(NamedTuple):
    """A linear classifier: scores are features @ weight.T + bias."""

    weight: torch.Tensor  # (C, E)
    bias: torch.Tensor  # (C,)


@dataclass(frozen=True)
class ProbeResult(Classification):
    """What a probe said of each image, and what it had to learn from."""

    learned_from: str  # in words
    learned: int  # how many images
    setting: float  # the L2 strength of a linear probe, the k of a k-NN probe


class Fitted(NamedTuple):
    """A linear probe, and how it came about."""

    linear: Linear
    strength: float
    learned: int  # images


def linear_probe(
    train: Labelled, validation: Labelled | None, classes: int, *, shots: int | None = None
) -> Fitted:
    """Choose the L2 strength on the validation part, then learn from both, as in CLIP's paper.

    Without a validation part it is a fifth of each class. With `shots`, so many images of each
    class are drawn to learn from, and at most four others to choose the strength on.

    Raises:
        DataError: no image is left to choose the strength on.
    """
    if shots is not None:
        drawn, rest = draw_per_class(train.labels, shots)
        pool = _rows(train, rest) if validation is None else validation
        held = _rows(pool, draw_per_class(pool.labels, min(shots, FEW))[0])
        part = whole = _rows(train, drawn)
    elif validation is None:
        drawn, rest = draw_per_class(train.labels, HELD_OUT)
        part, held, whole = _rows(train, rest), _rows(train, drawn), train
    else:
        part, held = train, validation
        whole = Labelled(*(torch.cat(pair) for pair in zip(train, validation, strict=True)))
    if not len(held.labels):
        raise DataError(
            "linear probe: no image is left to choose the L2 strength on; give fewer --shots, or "
            "a data set with more images a class"
        )
    strength = choose_strength(part, held, classes)[0]
    return Fitted(logistic_regression(whole, classes, strength), strength, len(whole.labels))


def _rows(some: Labelled, rows: torch.Tensor) -> Labelled:
    return Labelled(some.features[rows], some.labels[rows])


def logistic_regression(
    train: Labelled, classes: int, strength: float, start: Linear | None = None
) -> Linear:
    """The minimum of the summed cross-entropy + strength / 2 * the squared norm of the weights.

    scikit-learn's L-BFGS (its C is 1 / strength) where it is installed and the features are on
    the CPU; else PyTorch's, on the features' device, from `start`. The bias costs nothing.
    """
    if train.features.device.type == "cpu" and find_spec("sklearn") is not None:
        return _by_sklearn(train, classes, strength)
    return by_torch(train, classes, strength, start)


def _by_sklearn(train: Labelled, classes: int, strength: float) -> Linear:
    from sklearn.linear_model import LogisticRegression

    present = train.labels.unique()  # the others get no score at all
    weight = torch.zeros(classes, train.features.shape[1])
    bias = torch.full((classes,), -math.inf)
    if len(present) == 1:
        bias[present] = 0
        return Linear(weight, bias)
    # Of two classes it has one row of weights, whose squared norm is twice that of two rows.
    share = 2 if len(present) == 2 else 1
    fit = LogisticRegression(C=share / strength, max_iter=_ITERATIONS)
    fit.fit(train.features.numpy(), train.labels.numpy())
    coefficients, intercepts = np.asarray(fit.coef_), np.asarray(fit.intercept_)
    if len(present) == 2:  # the row is the second's
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercepts = np.concatenate([-intercepts, intercepts]) / 2
    weight[present] = torch.from_numpy(coefficients).float()
    bias[present] = torch.from_numpy(intercepts).float()
    return Linear(weight, bias)


def by_torch(train: Labelled, classes: int, strength: float, start: Linear | None = None) -> Linear:
    """The same minimum by PyTorch's L-BFGS, in float32 on the features' device."""
    features, labels = train
    absent = torch.ones(classes, dtype=torch.bool, device=features.device)
    absent[labels.unique()] = False
    weight = features.new_zeros(classes, features.shape[1])
    bias = features.new_zeros(classes)
    if start is not None:
        weight.copy_(start.weight)
        bias.copy_(start.bias.masked_fill(absent, 0))
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
        logits = (features @ weight.T + bias).masked_fill(absent, -torch.inf)
        value = F.cross_entropy(logits, labels) + strength / 2 * weight.square().sum() / len(labels)
        value.backward()
        return value

    optimizer.step(loss)
    return Linear(weight.detach(), bias.detach().masked_fill(absent, -torch.inf))


def scores_of(linear: Linear, features: torch.Tensor) -> Iterator[torch.Tensor]:
    """Blocks (B, C) of the scores of features (M, E)."""
    for part in features.split(max(1, _BLOCK // len(linear.bias))):
        yield part.to(linear.weight.device) @ linear.weight.T + linear.bias


def choose_strength(
    train: Labelled, validation: Labelled, classes: int
) -> tuple[float, dict[float, float]]:
    """The L2 strength that is best on the validation part, and the accuracy of each that was tried.

    The sweep of CLIP's paper (arXiv 2103.00020, appendix A.3): of strengths from 1e-6 to 1e6,
    first seven two decades apart, then both sides of the best at half the distance, and so on to
    eight a decade. Of equals the strongest is taken.
    """
    tried: dict[int, float] = {}  # by eighths of a decade
    start: Linear | None = None

    def accuracy(eighths: int) -> float:
        nonlocal start
        start = logistic_regression(train, classes, 10 ** (eighths / 8), start)
        said = torch.cat([s.argmax(dim=1).cpu() for s in scores_of(start, validation.features)])
        return (said == validation.labels.cpu()).double().mean().item()

    return _sweep(accuracy, tried)


def _sweep(
    accuracy: Callable[[int], float], tried: dict[int, float]
) -> tuple[float, dict[float, float]]:
    """Coarse to fine, over -48 to 48 eighths of a decade."""
    step, best = 16, 0
    wanted = list(range(48, -49, -16))
    while True:
        for eighths in wanted:
            tried[eighths] = accuracy(eighths)
        best = max(tried, key=lambda eighths: (tried[eighths], eighths))
        step //= 2
        if not step:
            return 10 ** (best / 8), {10 ** (e / 8): value for e, value in tried.items()}
        around = (best + step, best - step)
        wanted = [e for e in around if -48 <= e <= 48 and e not in tried]


def neighbour_votes(train: Labelled, features: torch.Tensor, classes: int, k: int) -> Iterator:
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
    """Rows drawn from each class, and the rest: `count` images, or that share of them (below 1).

    Of a share at least one image of a class is left, and drawn where there are two.
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
