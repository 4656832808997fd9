"""Two models on the same samples."""

import pytest
import torch
from scipy.stats import binomtest, chi2

from leanclip.evaluate.paired import mcnemar


def outcomes(better: int, worse: int, both: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """What two models got right, with so many samples changed."""
    first = torch.tensor([False] * better + [True] * worse + [True] * both)
    second = torch.tensor([True] * better + [False] * worse + [True] * both)
    return first, second


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (3, 0), (8, 16), (12, 12), (1, 5)])
def test_mcnemar_with_few_changes_is_the_binomial_test(better: int, worse: int) -> None:
    found = mcnemar(*outcomes(better, worse))
    assert (found.better, found.worse, found.method) == (better, worse, "exact binomial")
    expected = binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert found.p == pytest.approx(expected)


@pytest.mark.parametrize(("better", "worse"), [(20, 5), (300, 240), (13, 13), (14, 13)])
def test_mcnemar_with_many_changes_is_the_corrected_chi_square(better: int, worse: int) -> None:
    found = mcnemar(*outcomes(better, worse))
    assert found.method.startswith("chi-square")
    statistic = max(abs(better - worse) - 1, 0) ** 2 / (better + worse)
    assert found.p == pytest.approx(chi2.sf(statistic, 1))
    exact = binomtest(better, better + worse).pvalue
    assert found.p == pytest.approx(exact, abs=0.02)


def test_mcnemar_by_hand() -> None:
    # Five samples changed, all for the better: 2 * (1/2)^5.
    assert mcnemar(*outcomes(5, 0)).p == 0.0625
