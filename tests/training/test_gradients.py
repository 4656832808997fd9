"""Every backward pass that is written by hand, against finite differences in float64.

Two are: the loss in tiles (with what the dense one does over ranks), and that of micro-batches,
which gives each its features' gradients.
"""

import ast
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT, ranks_of
from test_step import KINDS, PAIRS, Recording, batch_of, model_of
from torch import distributed
from torch.nn import functional as F

from leanclip import CLIP, Preprocess
from leanclip import losses as loss
from leanclip.config.training import TrainConfig
from leanclip.distributed.wrap_model import wrap_ddp
from leanclip.losses import contrastive_loss
from leanclip.model.clip import Features
from leanclip.training.step import train_step

GROUPS = torch.tensor([2, 2, 1, 0, 1])
CASES = list(itertools.product(KINDS, (True, False)))  # kind, is_tiled


def inputs() -> list[torch.Tensor]:
    """Features of five pairs, the scale and the bias."""
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(2, 5, 2, dtype=torch.float64, generator=generator)
    scalars = [torch.tensor(value, dtype=torch.float64) for value in (3.0, -2.0)]
    return [value.requires_grad_() for value in (*F.normalize(z, dim=-1), *scalars)]


def test_all_functions_with_a_backward_of_their_own_are_known() -> None:
    found = set()
    for path in (PROJECT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base) for base in node.bases]
                if any(base.endswith("Function") for base in bases):
                    found.add(node.name)
            for hook in ("register_hook", "register_full_backward_hook", "custom_op"):
                assert not (isinstance(node, ast.Attribute) and node.attr == hook), path
    assert found == {"_Tiled"}


@pytest.mark.parametrize("kept", [0, 12, 2**27])  # of 25 logits: none, those of one tile, all
def test_the_loss_in_tiles(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`gradcheck` also wants the same gradient of a second backward pass, which keeps nothing."""
    monkeypatch.setattr(loss, "MAX_LOGITS_KEPT", kept)
    for kind in KINDS:

        def of(*values: Any, kind=kind) -> torch.Tensor:
            more = {"kind": kind, "groups": GROUPS, "tile": 3}
            return contrastive_loss(*values[:3], bias=values[3], is_tiled=True, **more)

        assert torch.autograd.gradcheck(of, inputs())


class _ToAllRanks(torch.autograd.Function):
    """The same values; the gradient is the sum of all ranks'."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        del ctx
        return value.clone()

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]: as PyTorch wants it
        ctx: Any, upstream: torch.Tensor
    ) -> torch.Tensor:
        del ctx
        whole = upstream.clone()
        if distributed.is_initialized():
            distributed.all_reduce(whole)
        return whole


def over_three(rank: int) -> list[bool]:
    """`gradcheck` of the loss of the global batch, which all ranks do in step."""
    own = (slice(0, 2), slice(2, 2), slice(2, 5))[rank]  # the second has nothing
    results = []
    for kind, is_tiled in CASES:

        def of(*values: Any, kind=kind, is_tiled=is_tiled) -> torch.Tensor:
            zimg, ztxt, scale, bias = (_ToAllRanks.apply(value) for value in values)
            more: Any = {"kind": kind, "is_tiled": is_tiled, "groups": GROUPS[own], "tile": 2}
            return contrastive_loss(zimg[own], ztxt[own], scale, bias=bias, **more)  # pyright: ignore

        results.append(torch.autograd.gradcheck(of, inputs()))
    return results


def test_the_loss_over_ranks(tmp_path: Path) -> None:
    assert ranks_of(3, over_three, tmp_path) == [[True] * len(CASES)] * 3


class InDouble(CLIP):
    """Both towers from end to end in float64."""

    def forward(self, pixels: Any, tokens: torch.Tensor) -> Features:
        both = self.encode_image(pixels.double()), self.encode_text(tokens)
        zimg, ztxt = (F.normalize(features, dim=-1) for features in both)
        return Features(zimg, ztxt, self.logit_scale.exp())


def slopes_of(rank: int, world_size: int, is_tiled: bool) -> list[tuple[float, float]]:
    """Of each loss: its slope along a direction of the weights, by gradients and by differences."""
    rows = slice(0, 4) if rank == 0 else slice(4, None)
    batch = batch_of(rows if world_size == 2 else slice(None))
    assert len(batch) < PAIRS or world_size == 1
    results = []
    for kind in KINDS:
        model = InDouble(**model_of(kind, 14.3).config.model_dump()).double()
        model.load_state_dict(model_of(kind, 14.3).state_dict())
        model.logit_scale.requires_grad_(False)  # the step reads it as float32
        optimizer = Recording(model.parameters(), lr=0.1)
        settings = TrainConfig(micro_batches=3, tiled_loss=is_tiled)

        def at(values: list[torch.Tensor], model=model, optimizer=optimizer, **more) -> float:
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), values, strict=True):
                    parameter.copy_(value)
            pre = Preprocess(32)
            return train_step(model, optimizer, batch, pre, rate=0.1, **more).loss.item()

        more = {"settings": settings, "kind": kind, "towers": wrap_ddp(model)}
        here = [p.detach().clone() for p in model.parameters()]
        at(here, **more)
        gradients = optimizer.gradients
        generator = torch.Generator().manual_seed(6)
        along = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in here]
        along[[name for name, _ in model.named_parameters()].index("logit_scale")].zero_()
        by_gradients = sum(float((g * d).sum()) for g, d in zip(gradients, along, strict=True))
        small = 1e-6
        ends = [
            at([p + sign * small * d for p, d in zip(here, along, strict=True)], **more)
            for sign in (1, -1)
        ]
        results.append((by_gradients, (ends[0] - ends[1]) / (2 * small)))
    return results


@pytest.mark.parametrize("is_tiled", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
def test_micro_batches(world_size: int, is_tiled: bool, tmp_path: Path) -> None:
    work: Callable[[int], object] = lambda rank: slopes_of(rank, world_size, is_tiled)  # noqa: E731
    for slopes in ranks_of(world_size, work, tmp_path):
        for by_gradients, by_differences in slopes:
            assert math.isfinite(by_gradients)
            assert abs(by_gradients) > 1e-3
            assert by_gradients == pytest.approx(by_differences, rel=1e-6)
