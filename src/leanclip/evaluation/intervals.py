"""Bootstrap intervals: how much a metric varies between samples of the same kind.

    samples -> RESAMPLES draws of as many, with replacement -> the metric of each -> its middle 95%

The draws are seeded, and the same for every model: the same samples in the same order give the
same interval.

Shapes: N samples, R resamples of a chunk.
"""

from collections.abc import Callable, Mapping

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
_CHUNK = 1 << 22  # indices that are drawn at a time

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
        width: values that `measure` needs for a resample, where they are more than N.
        resamples: how many there are in all.
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
    """The mean of the values of all members of the groups that were drawn, (R, N) -> (R,).

    Args:
        values: of members, (M,).
        groups: of each member, from 0 to N - 1, (M,).
        drawn: groups.
    """
    sums = np.bincount(groups, values)
    sizes = np.bincount(groups)
    return sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)


def median_by_group(values: np.ndarray, groups: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """The median of the same values, (R, N) -> (R,)."""
    order, (rows, size) = values.argsort(kind="stable"), drawn.shape
    cells = drawn + size * np.arange(rows)[:, None]
    times = np.bincount(cells.ravel(), minlength=rows * size).reshape(rows, size)
    ends = times[:, groups[order]].cumsum(axis=1)  # (R, M): values drawn up to each
    low, high = ((ends <= (ends[:, -1:] - odd) // 2).sum(axis=1) for odd in (1, 0))
    return (values[order[low]] + values[order[high]]) / 2
