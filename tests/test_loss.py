"""The loss against its formula, and its properties."""

import math

import pytest
import torch
from torch.nn import functional as F

from leanclip import clip_loss


def features(n: int, dim: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    zimg, ztxt = F.normalize(torch.randn(2, n, dim, dtype=torch.float64), dim=-1)
    return zimg, ztxt


def test_the_formula_written_out() -> None:
    zimg, ztxt = features(5)
    scale = 7.0
    total = 0.0
    for i in range(5):
        rows = [math.exp(scale * float(zimg[i] @ ztxt[j])) for j in range(5)]
        columns = [math.exp(scale * float(zimg[j] @ ztxt[i])) for j in range(5)]
        total -= math.log(rows[i] / sum(rows)) / 2 + math.log(columns[i] / sum(columns)) / 2
    loss = clip_loss(zimg, ztxt, torch.tensor(scale))
    assert loss.item() == pytest.approx(total / 5, rel=1e-5)


def test_chance_is_the_logarithm_of_the_batch() -> None:
    same = F.normalize(torch.ones(6, 4), dim=-1)
    assert clip_loss(same, same, torch.tensor(20.0)).item() == pytest.approx(math.log(6), rel=1e-5)


def test_matching_pairs_cost_nothing() -> None:
    assert clip_loss(torch.eye(6), torch.eye(6), torch.tensor(100.0)).item() < 1e-6


def test_it_is_symmetric_and_blind_to_the_order_of_pairs() -> None:
    zimg, ztxt = features(7)
    scale, order = torch.tensor(10.0), torch.randperm(7)
    loss = clip_loss(zimg, ztxt, scale)
    torch.testing.assert_close(clip_loss(ztxt, zimg, scale), loss)
    torch.testing.assert_close(clip_loss(zimg[order], ztxt[order], scale), loss)


def test_half_precision_features_are_compared_in_float32() -> None:
    zimg, ztxt = (z.to(torch.bfloat16) for z in features(7))
    assert clip_loss(zimg, ztxt, torch.tensor(100.0)).dtype == torch.float32


def test_gradients_by_finite_differences() -> None:
    zimg, ztxt = (z.requires_grad_() for z in features(4, 3))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)

    # The loss computes in float32, hence the wide step and tolerance.
    assert torch.autograd.gradcheck(clip_loss, (zimg, ztxt, scale), eps=1e-2, atol=1e-2, rtol=1e-2)
