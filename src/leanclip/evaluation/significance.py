"""Two models on the same samples: did one get more right, or was it luck?

right or wrong by sample, of both -> McNemar's test, what changed for better and for worse

Shapes: N samples.
"""

import math
from collections import Counter
from dataclasses import dataclass

import torch

EXACT_BELOW = 25  # samples, or groups of them, that changed: fewer are counted exactly


@dataclass(frozen=True)
class McNemar:
    """McNemar's test: do as many samples change for the better as for the worse?

    `p` is the chance of a difference at least as large if neither model were the better one.
    """

    better: int  # wrong by the first, right by the second
    worse: int
    p: float
    method: str  # "exact binomial" or "chi-square with continuity correction"; ", by images"


def mcnemar(
    first: torch.Tensor, second: torch.Tensor, groups: torch.Tensor | None = None
) -> McNemar:
    """The two-sided test on what two models got right, (N,) bool each, sample by sample.

    By the binomial distribution where fewer than EXACT_BELOW samples changed, else by the
    chi-square distribution with Edwards' continuity correction.

    Samples of one group, such as the captions of an image, are not independent. With `groups`,
    (N,) int64, the test asks how often the sum of all groups' differences, better less worse,
    would be as far from 0 if each group's difference had either sign with the same chance: with
    one sample per group that is McNemar's test.
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
    """The chance that the sum of sizes with random signs is as far from 0 as was found."""
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
