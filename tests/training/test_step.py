"""One step's gradients: the same however the batch is split over ranks and micro-batches."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, ranks_of
from families import FAMILIES

from leanclip import CLIP, Preprocess
from leanclip.config.training import OptimizerConfig, TrainConfig
from leanclip.data.batch import Batch
from leanclip.data.skipped import Bad
from leanclip.distributed.preemption import Signals
from leanclip.distributed.wrap_model import wrap_ddp
from leanclip.losses import Kind, clip_loss, multi_positive_loss, siglip_loss
from leanclip.preprocess.images import normalize
from leanclip.preprocess.tokenizer import tokenize
from leanclip.training.loop import _sum_counts
from leanclip.training.optimizer import build_optimizer
from leanclip.training.step import train_step

KINDS: tuple[Kind, ...] = ("clip", "multi-positive", "siglip")
PAIRS = 11  # divides by no number of ranks or micro-batches
CASES: list[tuple[Kind, bool, int, float, str]] = [
    *((*case, "clip") for case in itertools.product(KINDS, (True, False), (1, 4), (14.3, 100.0))),
    *(("siglip" if arch.get("logit_bias") else "clip", True, 4, 14.3, name)
      for name, arch in FAMILIES.items()),
]  # fmt: skip
GROUPS = torch.tensor([0, 1, 2, 0, 3, 3, 4, 1, 5, 6, 0])


class Recording(torch.optim.SGD):
    """Keeps the gradients that it is given, and changes nothing."""

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        del closure
        self.gradients = [
            torch.zeros(()) if p.grad is None else p.grad.clone()
            for group in self.param_groups
            for p in group["params"]
        ]


def model_of(kind: Kind, scale: float, family: str = "clip") -> CLIP:
    torch.manual_seed(3)
    arch = FAMILIES.get(family, TINY) | {"image_resolution": 32}
    model = CLIP(**arch | {"logit_bias": kind == "siglip"})
    with torch.no_grad():
        model.logit_scale.fill_(math.log(scale))
    return model


def batch_of(rows: slice = slice(None)) -> Batch:
    generator = torch.Generator().manual_seed(8)
    images = torch.randint(0, 256, (PAIRS, 3, 32, 32), dtype=torch.uint8, generator=generator)
    captions = [" ".join(["number", *["very"] * (i % 4), str(i % 8)]) for i in range(PAIRS)]
    tokens = tokenize(captions, 24)  # the last three are those of 0, 1 and 2
    index = torch.arange(PAIRS)
    return Batch(
        images[rows], tokens[rows], index[rows], torch.full((PAIRS,), -1)[rows], groups=GROUPS[rows]
    )


def parts_of(model: CLIP) -> dict[str, list[int]]:
    """Which parameters are of the vision tower, the text tower, and each scalar."""
    names = [name for name, _ in model.named_parameters()]
    scalars = [name for name in names if name.startswith("logit_")]
    parts = {name: [names.index(name)] for name in scalars}
    parts["vision"] = [i for i, name in enumerate(names) if name.startswith("visual.")]
    parts["text"] = [
        i for i, name in enumerate(names) if not name.startswith("visual.") and name not in scalars
    ]
    return parts


def results_of(rank: int, world_size: int) -> list[tuple[float, dict[str, np.ndarray]]]:
    """The loss and the gradients of every case, as this rank has them after the step."""
    cuts = [0, *(3, 3, 9)[: world_size - 1], PAIRS]  # of four ranks, one has nothing
    batch = batch_of(slice(cuts[rank], cuts[rank + 1]))
    results = []
    for kind, is_tiled, micro_batches, scale, family in CASES:
        model = model_of(kind, scale, family)
        model.uses_packing = micro_batches == 4
        optimizer = Recording(model.parameters(), lr=0.1, fused=True)
        loss, _, is_finite, _ = train_step(
            model,
            optimizer,
            batch,
            Preprocess(32),
            rate=0.1,
            settings=TrainConfig(micro_batches=micro_batches, tiled_loss=is_tiled),
            kind=kind,
            towers=wrap_ddp(model),
        )
        assert is_finite
        gradients = {
            part: torch.cat([optimizer.gradients[i].reshape(-1) for i in indices]).numpy()
            for part, indices in parts_of(model).items()
        }
        results.append((loss.item(), gradients))
    return results


def reference(kind: Kind, scale: float, family: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The same in one process, dense, in float64."""
    model, batch, preprocess = model_of(kind, scale, family).double(), batch_of(), Preprocess(32)
    pixels = normalize(batch.images, preprocess.mean, preprocess.std).double()
    zimg, ztxt = (
        torch.nn.functional.normalize(z, dim=-1)
        for z in (model.encode_image(pixels), model.encode_text(batch.tokens))
    )
    factor = model.logit_scale.exp()
    if kind == "siglip":
        assert model.logit_bias is not None
        loss = siglip_loss(zimg, ztxt, factor, model.logit_bias)
    elif kind == "clip":
        loss = clip_loss(zimg, ztxt, factor)
    else:
        loss = multi_positive_loss(zimg, ztxt, factor, GROUPS)
    loss.backward()
    parameters = list(model.parameters())
    gradients = {}
    for part, indices in parts_of(model).items():
        flat = [parameters[i].grad for i in indices]
        gradients[part] = torch.cat([g.reshape(-1) for g in flat if g is not None])
    return loss.item(), gradients


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_do_not_depend_on_how_the_batch_is_split(world_size: int, tmp_path: Path) -> None:
    of_ranks = ranks_of(world_size, lambda rank: results_of(rank, world_size), tmp_path)
    for number, case in enumerate(CASES):
        kind, _, _, scale, family = case
        loss, gradients = reference(kind, scale, family)
        for results in of_ranks:  # every rank ends with the whole gradient
            found, parts = results[number]
            assert found == pytest.approx(loss, rel=1e-5), case
            for part, expected in gradients.items():
                ours = torch.from_numpy(parts[part]).double()
                error = float((ours - expected).norm() / expected.norm())
                assert error < 1e-5, (*case, part, error)


def test_a_caption_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = CLIP(**TINY), []
    encode = model.encode_text
    monkeypatch.setattr(
        model, "encode_text", lambda tokens: seen.append(len(tokens)) or encode(tokens)
    )
    optimizer = Recording(model.parameters(), lr=0.1, fused=True)
    train_step(model, optimizer, batch_of(), Preprocess(32), rate=0.1)
    assert seen == [8]


def test_a_caption_that_is_often_there_has_the_same_gradients_each_time() -> None:
    batch = batch_of()
    rows = torch.arange(96) % PAIRS
    many = Batch(batch.images[rows], batch.tokens[rows % 3], rows, rows)
    threads, found = torch.get_num_threads(), set()
    torch.set_num_threads(2)
    for _ in range(8):
        torch.manual_seed(3)
        model = CLIP(**TINY | {"embed_dim": 512})
        optimizer = Recording(model.parameters(), lr=0.1, fused=True)
        train_step(model, optimizer, many, Preprocess(32), rate=0.1)
        found.add(b"".join(g.numpy().tobytes() for g in optimizer.gradients))
    torch.set_num_threads(threads)
    assert len(found) == 1


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    model = CLIP(**TINY)
    optimizer = build_optimizer(model, OptimizerConfig())
    train_step(model, optimizer, batch_of(), Preprocess(32), rate=1e-3)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    moments = {
        k: v.clone() for k, v in optimizer.state[model.get_parameter("text_projection")].items()
    }
    bad = Preprocess(32, std=(0.0, 1.0, 1.0))  # divides by zero
    for settings in (TrainConfig(), TrainConfig(micro_batches=3)):
        result = train_step(model, optimizer, batch_of(), bad, rate=1e-3, settings=settings)
        assert not result.is_finite
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    for key, value in moments.items():
        assert torch.equal(optimizer.state[model.get_parameter("text_projection")][key], value)
    assert train_step(model, optimizer, batch_of(), Preprocess(32), rate=1e-3).is_finite
    assert not torch.equal(before["text_projection"], model.get_parameter("text_projection"))


@pytest.mark.parametrize(("scale", "bounded"), [(200.0, 100.0), (0.5, 1.0), (30.0, 30.0)])
def test_a_step_keeps_the_scale_within_its_bounds(scale: float, bounded: float) -> None:
    model = model_of("clip", scale)
    optimizer = build_optimizer(model, OptimizerConfig())
    train_step(model, optimizer, batch_of(), Preprocess(32), rate=1e-6)
    assert model.logit_scale.exp().item() == pytest.approx(bounded, rel=1e-4)


def test_micro_batches_keep_one_graph_at_a_time() -> None:
    """The most that autograd keeps at once falls with the number of micro-batches."""
    peaks = {}
    for micro_batches in (1, 4):
        model, kept = CLIP(**TINY), {"now": 0, "most": 0}
        optimizer = build_optimizer(model, OptimizerConfig())

        class Kept:
            """A tensor that autograd keeps; counted while it is alive."""

            def __init__(self, tensor: torch.Tensor, kept: dict[str, int]) -> None:
                self.tensor, self.kept = tensor, kept
                kept["now"] += tensor.numel()
                kept["most"] = max(kept["most"], kept["now"])

            def __del__(self) -> None:
                self.kept["now"] -= self.tensor.numel()

        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept, Kept=Kept: Kept(tensor, kept), lambda kept: kept.tensor
        ):
            settings = TrainConfig(micro_batches=micro_batches)
            train_step(model, optimizer, batch_of(), Preprocess(32), rate=1e-3, settings=settings)
        peaks[micro_batches] = kept["most"]
    weights = sum(p.numel() for p in CLIP(**TINY).parameters())
    assert peaks[4] - weights < (peaks[1] - weights) or peaks[4] < 0.6 * peaks[1]


def bad_of(rank: int) -> list[str]:
    """The samples that a rank knows to be skipped in a step in which only the second has one."""
    batch = batch_of()
    batch.bad = [Bad("b.png", "damaged image", "b.png: is damaged")] * (rank == 1)
    return [one.id for one in _sum_counts(batch, Signals(), 0).bad]


def test_all_ranks_know_what_one_has_skipped(tmp_path: Path) -> None:
    assert ranks_of(2, bad_of, tmp_path) == [["b.png"]] * 2
