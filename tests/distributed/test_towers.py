"""Less memory and compiled towers: the same numbers, the same names."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY
from families import FAMILIES
from test_step import Recording, batch_of
from torch import nn

from leanclip import CLIP, Preprocess
from leanclip.config.schema import Config
from leanclip.config.sections import parse
from leanclip.config.training import TrainConfig
from leanclip.distributed.wrap_model import checkpoint_activations, compile_towers
from leanclip.training.plan import make_plan, memory_estimate
from leanclip.training.step import train_step

RESNET = {name: value for name, value in TINY.items() if not name.startswith("vision_")} | {
    "vision_layers": [1, 2, 1, 1],
    "vision_width": 8,
    "vision_heads": 4,
}
Change = Callable[[CLIP], None]


def stepped(
    arch: dict, change: Change | None = None, micro_batches: int = 1
) -> tuple[CLIP, list[torch.Tensor]]:
    torch.manual_seed(4)
    model = CLIP(**arch)
    for module in model.modules():  # or the blocks are their shortcuts, and have no gradients
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    if change is not None:
        change(model)
    optimizer = Recording(model.parameters(), lr=0.1, fused=True)
    settings = TrainConfig(micro_batches=micro_batches)
    train_step(model, optimizer, batch_of(), Preprocess(32), rate=0.1, settings=settings)
    return model, optimizer.gradients


@pytest.mark.parametrize(
    ("arch", "micro_batches"),
    [
        *((arch, micro_batches) for arch in (TINY, RESNET) for micro_batches in (1, 3)),
        *((arch | {"image_resolution": 32}, 1) for arch in FAMILIES.values()),
    ],
)
def test_checkpointed_activations_give_the_same_bits(arch: dict, micro_batches: int) -> None:
    plain, expected = stepped(arch, None, micro_batches)
    model, found = stepped(arch, checkpoint_activations, micro_batches)
    assert any(bool(gradient.any()) for gradient in found)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    for name, value in plain.state_dict().items():  # with the statistics of every BatchNorm
        assert torch.equal(model.state_dict()[name], value), name


def test_checkpointed_activations_of_packed_texts_give_the_same_bits() -> None:
    def packed(model: CLIP) -> None:
        model.uses_packing = True

    def packed_and_checkpointed(model: CLIP) -> None:
        packed(model)
        checkpoint_activations(model)

    for ours, theirs in zip(
        stepped(TINY, packed_and_checkpointed)[1], stepped(TINY, packed)[1], strict=True
    ):
        assert torch.equal(ours, theirs)


def test_statistics_are_updated_once_a_micro_batch() -> None:
    model, _ = stepped(RESNET, None, 3)
    counts = {int(b) for name, b in model.named_buffers() if name.endswith("batches_tracked")}
    assert counts == {3}


def test_checkpointed_activations_are_not_kept() -> None:
    """What autograd keeps of a forward pass falls; the estimate of --dry-run counts it."""
    deep = TINY | {"vision_layers": 6, "transformer_layers": 6}
    sizes = {}
    for is_checkpointed in (False, True):
        model, kept = CLIP(**deep), {}
        if is_checkpointed:
            checkpoint_activations(model)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.setdefault(t.untyped_storage()._cdata, t), lambda t: t
        ):
            model(torch.randn(4, 3, 32, 32), torch.ones(4, 24, dtype=torch.int64))
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        sizes[is_checkpointed] = sum(t.numel() for key, t in kept.items() if key not in own)
    assert sizes[True] < 0.3 * sizes[False]


def test_the_estimate_knows_of_checkpointing(workplace: Path) -> None:
    del workplace
    estimates = {}
    for is_checkpointed in (False, True):
        values = {
            "model": dict(TINY),
            "data": {"format": "pairs", "root": "data", "workers": 0},
            "train": {"batch_size": 4, "checkpoint_activations": is_checkpointed},
        }
        plan = make_plan(parse(Config, values, where="test"), torch.device("cpu"))
        estimates[is_checkpointed] = memory_estimate(plan)
    assert estimates[True][0] == estimates[False][0]
    assert estimates[True][1] < 0.5 * estimates[False][1]


@pytest.mark.parametrize("family", ["clip", "siglip", "biomed"])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_compiled_towers_have_the_same_gradients_and_names(
    is_checkpointed: bool, family: str
) -> None:
    """With aot_eager: inductor builds C++ for a minute, which the slow test does."""

    def change(model: CLIP) -> None:
        if is_checkpointed:
            checkpoint_activations(model)
        compile_towers(model, "aot_eager")

    arch = FAMILIES.get(family, TINY) | {"image_resolution": 32}
    plain, expected = stepped(arch)
    model, found = stepped(arch, change)
    assert list(model.state_dict()) == list(plain.state_dict())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_inductor_compiles_both_towers() -> None:
    plain, expected = stepped(TINY)
    model, found = stepped(TINY, compile_towers)
    assert list(model.state_dict()) == list(plain.state_dict())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
