"""Two models on the same samples: did one get more right, or was it luck?

right or wrong by sample, of both -> McNemar's test, what changed for better and for worse

Shapes: N samples.
"""

import math
from dataclasses import dataclass

import torch

EXACT_BELOW = 25  # samples that changed: fewer are counted exactly


@dataclass(frozen=True)
class McNemar:
    """McNemar's test: do as many samples change for the better as for the worse?

    `p` is the chance of a difference at least as large if neither model were the better one.
    """

    better: int  # wrong by the first, right by the second
    worse: int
    p: float
    method: str  # "exact binomial" or "chi-square with continuity correction"


def mcnemar(first: torch.Tensor, second: torch.Tensor) -> McNemar:
    """The two-sided test on what two models got right, (N,) bool each, sample by sample.

    By the binomial distribution where fewer than EXACT_BELOW samples changed, else by the
    chi-square distribution with Edwards' continuity correction.
    """
    better = int((~first & second).sum())
    worse = int((first & ~second).sum())
    changed, fewer = better + worse, min(better, worse)
    if changed < EXACT_BELOW:
        tail = sum(math.comb(changed, i) for i in range(fewer + 1)) / 2**changed
        return McNemar(better, worse, min(1.0, 2 * tail), "exact binomial")
    statistic = max(abs(better - worse) - 1, 0) ** 2 / changed
    p = math.erfc(math.sqrt(statistic / 2))  # of chi-square with one degree of freedom
    return McNemar(better, worse, p, "chi-square with continuity correction")
