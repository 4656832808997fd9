"""Bootstrap intervals of metrics, and McNemar's test between two models.

    samples -> RESAMPLES draws of as many, with replacement -> the metric of each -> its middle 95%
    correct or not by sample, of two models -> McNemar's test

The draws are seeded and the same for every model: the same samples in the same order give the
same interval.

Shapes: N samples, R resamples of a chunk, M members of N groups.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

RESAMPLES = 1000
LEVEL = 0.95
EXACT_BELOW = 25  # changed samples, or groups of them: fewer are counted exactly
_CHUNK = 1 << 22  # indices drawn at a time

Interval = tuple[float, float]


def bootstrap(
    size: int,
    measure: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    *,
    width: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Interval]:
    """95% percentile intervals of metrics of `size` samples (Efron, 1979).

    Args:
        size: N.
        measure: indices of resamples (R, N) -> metrics by name, (R,) each.
        width: values that `measure` needs per resample, if more than N.
        resamples: how many to draw.
    """
    rng = np.random.default_rng(0)
    rows = max(1, _CHUNK // max(size, width, 1))
    found: dict[str, list[np.ndarray]] = {}
    for first in range(0, resamples, rows):
        drawn = rng.integers(size, size=(min(rows, resamples - first), size), dtype=np.int32)
        for name, values in measure(drawn).items():
            found.setdefault(name, []).append(values)
    tails = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    low_high = {k: np.quantile(np.concatenate(v), tails) for k, v in found.items()}
    return {name: (float(low), float(high)) for name, (low, high) in low_high.items()}


def mean_by_group(values: np.ndarray, groups: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """The mean over all members of the drawn groups: values and groups (M,), drawn (R, N) -> (R,).

    Groups are numbered from 0 to N - 1.
    """
    sums = np.bincount(groups, values)
    sizes = np.bincount(groups)
    return sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)


def median_by_group(values: np.ndarray, groups: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """As `mean_by_group`, the median."""
    order, (rows, size) = values.argsort(kind="stable"), drawn.shape
    cells = drawn + size * np.arange(rows)[:, None]
    times = np.bincount(cells.ravel(), minlength=rows * size).reshape(rows, size)
    ends = times[:, groups[order]].cumsum(axis=1)  # (R, M): values drawn up to each
    low, high = ((ends <= (ends[:, -1:] - odd) // 2).sum(axis=1) for odd in (1, 0))
    return (values[order[low]] + values[order[high]]) / 2


@dataclass(frozen=True)
class McNemar:
    """McNemar's test: as many samples changed for the better as for the worse.

    `p` is the probability of a difference at least as large if neither model is better.
    """

    better: int  # the first model is wrong, the second correct
    worse: int
    p: float
    method: str  # "exact binomial" or "chi-square with continuity correction"; ", by images"


def mcnemar(
    first: torch.Tensor, second: torch.Tensor, groups: torch.Tensor | None = None
) -> McNemar:
    """The two-sided test on which samples two models got right, (N,) bool each.

    By the binomial distribution if fewer than EXACT_BELOW samples changed, else by the chi-square
    distribution with Edwards' continuity correction.

    Samples of one group, such as the captions of an image, are not independent. With `groups`,
    (N,) int64, the signs of the groups' differences (better less worse) are flipped at random:
    `p` is the probability of a sum at least as far from 0. With one sample per group that is
    McNemar's test.
    """
    better, worse = ~first & second, first & ~second
    changes = better.long() - worse.long()
    if groups is not None:
        changes = torch.zeros(int(groups.max()) + 1, dtype=torch.int64).index_add_(
            0, groups, changes
        )
    sizes = changes[changes != 0].abs().tolist()
    p, method = _two_sided(sizes, abs(int(changes.sum())))
    if groups is not None and len(groups) > len(changes):
        method = f"{method}, by images"
    return McNemar(int(better.sum()), int(worse.sum()), p, method)


def _two_sided(sizes: list[int], found: int) -> tuple[float, str]:
    """The probability that the sum of sizes with random signs is at least as far from 0."""
    if len(sizes) < EXACT_BELOW:
        ways = Counter({0: 1})  # of signs, by their sum
        for size in sizes:
            ways = Counter({total + size: n for total, n in ways.items()}) + Counter(
                {total - size: n for total, n in ways.items()}
            )
        far = sum(n for total, n in ways.items() if abs(total) >= found)
        is_binomial = all(size == 1 for size in sizes)
        return far / 2 ** len(sizes), "exact binomial" if is_binomial else "exact sign flips"
    step = math.gcd(*sizes)  # sums are two steps apart
    statistic = max(found - step, 0) ** 2 / sum(size**2 for size in sizes)
    p = math.erfc(math.sqrt(statistic / 2))  # of chi-square with one degree of freedom
    return p, "chi-square with continuity correction"
