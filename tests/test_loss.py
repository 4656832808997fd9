"""The loss against its formula, and its properties."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from conftest import ranks_of
from torch.nn import functional as F

from leanclip import clip_loss
from leanclip.losses import Kind, contrastive_loss, multi_positive_loss, siglip_loss


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

    assert torch.autograd.gradcheck(clip_loss, (zimg, ztxt, scale))
    for kind in KINDS:
        groups = torch.tensor([2, 2, 1, 0])
        for is_tiled in (True, False):
            assert torch.autograd.gradcheck(
                lambda *inputs, kind=kind, is_tiled=is_tiled, groups=groups: contrastive_loss(
                    *inputs[:3], bias=inputs[3], kind=kind, groups=groups, is_tiled=is_tiled, tile=3
                ),
                (zimg, ztxt, scale, torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)),
            )


# --- over ranks, in tiles


KINDS: tuple[Kind, ...] = ("clip", "multi-positive", "siglip")
CASES = list(itertools.product(KINDS, (True, False), (10.0, 100.0)))  # kind, is_tiled, scale
PAIRS = 23  # divides by no number of ranks


def the_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(2, PAIRS, 16, generator=generator)
    zimg, ztxt = F.normalize(z, dim=-1)
    return zimg, ztxt, torch.randint(0, 6, (PAIRS,), generator=generator)


def loss_and_gradients(rank: int, world_size: int) -> list[list[list[float]]]:
    """Of every case: loss; this rank's share of the gradients, those of features by row."""
    zimg, ztxt, groups = the_batch()
    cuts = [0, *(5, 5, 16)[: world_size - 1], PAIRS]  # of four ranks, one has nothing
    own = slice(cuts[rank], cuts[rank + 1])
    results = []
    for kind, is_tiled, scale in CASES:
        inputs = [z[own].clone().requires_grad_() for z in (zimg, ztxt)]
        inputs += [torch.tensor(value, requires_grad=True) for value in (scale, -10.0)]
        loss = contrastive_loss(
            *inputs[:3], kind=kind, bias=inputs[3], groups=groups[own], is_tiled=is_tiled, tile=5
        )
        loss.backward()
        shares = [z.grad if z.grad is not None else torch.zeros(()) for z in inputs]
        results.append([[loss.item()], *(share.reshape(-1).tolist() for share in shares)])
    return results


def dense_in_float64(kind: Kind, scale: float) -> list[torch.Tensor]:
    """The loss and all gradients by the equations in one process."""
    zimg, ztxt, groups = the_batch()
    values = (zimg, ztxt, torch.tensor(scale), torch.tensor(-10.0))
    a, b, s, t = (value.double().requires_grad_() for value in values)
    losses = {
        "clip": lambda: clip_loss(a, b, s),
        "multi-positive": lambda: multi_positive_loss(a, b, s, groups),
        "siglip": lambda: siglip_loss(a, b, s, t),
    }
    loss = losses[kind]()
    loss.backward()
    gradients = [z.grad if z.grad is not None else torch.zeros(()) for z in (a, b, s, t)]
    return [loss.detach().reshape(1), *(g.double().reshape(-1) for g in gradients)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_and_tiles_change_neither_loss_nor_gradients(world_size: int, tmp_path: Path) -> None:
    of_ranks = ranks_of(world_size, lambda r: loss_and_gradients(r, world_size), tmp_path)
    for number, (kind, is_tiled, scale) in enumerate(CASES):
        shares = [torch.tensor(results[number][0]) for results in of_ranks]
        assert len({float(share) for share in shares}) == 1  # the same on all ranks
        found = [shares[0].double()]
        for part in (1, 2):
            rows = [torch.tensor(results[number][part]).double() for results in of_ranks]
            found.append(torch.cat(rows))
        for part in (3, 4):
            sums = [torch.tensor(results[number][part]).double() for results in of_ranks]
            found.append(torch.stack(sums).sum(dim=0))
        expected = dense_in_float64(kind, scale)
        for ours, reference in zip(found, expected, strict=True):
            error = (ours - reference).norm() / reference.norm().clamp(min=1e-30)
            assert error < 1e-5 or reference.norm() == ours.norm() == 0, (kind, is_tiled, scale)


def test_pairs_of_one_caption_are_not_each_others_negatives() -> None:
    same = torch.eye(4)[[0, 0, 1, 1]]  # two classes, two pairs of each, perfectly told apart
    scale, groups = torch.tensor(100.0), torch.tensor([7, 7, 3, 3])
    assert clip_loss(same, same, scale).item() == pytest.approx(math.log(2), rel=1e-5)
    a, b = (same.clone().requires_grad_() for _ in range(2))
    for is_tiled in (True, False):
        loss = contrastive_loss(
            a, b, scale, kind="multi-positive", groups=groups, is_tiled=is_tiled
        )
        assert loss.item() == pytest.approx(math.log(2), rel=1e-5)  # the entropy of the targets
        (gradient,) = torch.autograd.grad(loss, a)
        assert gradient.abs().max() < 1e-6  # nothing is left to learn


def test_groups_of_one_are_plain_infonce() -> None:
    zimg, ztxt = features(9)
    scale = torch.tensor(20.0)
    torch.testing.assert_close(
        multi_positive_loss(zimg, ztxt, scale, torch.arange(9)), clip_loss(zimg, ztxt, scale)
    )


def test_siglip_written_out() -> None:
    zimg, ztxt = features(4)
    total = 0.0
    for i, j in itertools.product(range(4), repeat=2):
        logit = 10 * float(zimg[i] @ ztxt[j]) - 10
        total += math.log1p(math.exp(-logit if i == j else logit))
    loss = siglip_loss(zimg, ztxt, torch.tensor(10.0), torch.tensor(-10.0))
    assert loss.item() == pytest.approx(total / 4, rel=1e-5)


def test_no_tile_is_kept() -> None:
    """What autograd keeps between forward and backward grows with N, not with its square."""
    kept: list[int] = []
    zimg, ztxt = (z.float().requires_grad_() for z in features(600))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        contrastive_loss(zimg, ztxt, torch.tensor(10.0), tile=50)
    assert 0 < sum(kept) < 600 * 600 / 10
