"""Batches of images of different lengths: what each holds, on any rank, from any position."""

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_pairs

from leanclip.config.data import DataConfig
from leanclip.data import open_dataset
from leanclip.data.batch import Position
from leanclip.data.batch_sizes import BatchSizes
from leanclip.data.loader import evaluation_batches, training_batches
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.patches import Patches
from leanclip.preprocess.text import Tokenizer

NAFLEX = Preprocess(16, resize="naflex", patch_size=4, max_patches=16)
LENGTHS = (4, 9, 16)


@pytest.mark.parametrize("dataset", [1, 7, 8, 100, 10_000, 10_007])
@pytest.mark.parametrize("lengths", [(), (64,), (64, 144, 256), (256, 64)])
def test_an_epoch_has_all_lengths_and_nearly_all_samples(
    dataset: int, lengths: tuple[int, ...]
) -> None:
    sizes = BatchSizes(dataset, 8, 5, lengths)
    assert sizes.sizes[-1].samples == min(8, dataset)
    for samples, patches in sizes.sizes:
        assert samples == dataset or patches is None or 8 * max(lengths) - samples * patches >= 0
    orders = []
    for epoch in range(3):
        order = sizes.rest(Position(epoch))
        orders.append(tuple(order))
        assert len(order) == sizes.steps_per_epoch > 0
        assert 0 <= dataset - sum(size.samples for size in order) < sizes.sizes[-1].samples
        counts = Counter(order)
        if dataset >= 10_000:
            assert max(counts.values()) - min(counts.values()) <= 1 + len(lengths)
            assert sizes.mean == pytest.approx(np.mean([size.samples for size in order]))
    if dataset >= 10_000 and len(lengths) > 1:
        assert len(set(orders)) == 3
        assert orders[0] != tuple(BatchSizes(dataset, 8, 6, lengths).rest(Position()))


def test_the_rest_follows_from_the_position_alone() -> None:
    sizes = BatchSizes(1000, 8, 5, (64, 144, 256))
    batches = list(islice(sizes.batches(Position()), 150))
    assert {after.epoch for *_, after in batches} >= {0, 1, 2}
    for number in (0, 1, 17, 62, 63, 64, 100):
        assert list(islice(sizes.batches(batches[number][1]), 20)) == batches[number:][:20]
    for sample in range(990, 1000):  # between two batches, where other sizes were used before
        room = 1000 - sample
        rest = sizes.rest(Position(0, sample))
        assert sum(size.samples for size in rest) <= room
        assert next(sizes.batches(Position(0, sample)))[1].epoch == (0 if rest else 1)


def stream(root: Path, start: Position = Position(), **more: object):  # noqa: B008
    config = DataConfig(format="pairs", root=str(root), workers=0, patches=LENGTHS)
    config = config.model_copy(update={k: more.pop(k) for k in ("workers",) if k in more})
    values = {"batch_size": 5} | more
    return training_batches(
        open_dataset(config), config, preprocess=NAFLEX, tokenizer=Tokenizer(12), truncate=True,
        seed=3, start=start, **values,  # pyright: ignore
    )  # fmt: skip


def same(one: Patches, other: Patches) -> bool:
    return torch.equal(one.values, other.values) and torch.equal(one.shapes, other.shapes)


def test_streams_are_the_same_by_workers_ranks_and_after_any_sample(tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "data", 60)
    whole = list(islice(stream(root), 12))
    assert {batch.images.values.shape[1] for batch, _ in whole} == set(LENGTHS)  # pyright: ignore
    for (batch, position), (other, same_position) in zip(
        whole, stream(root, workers=2), strict=False
    ):
        assert position == same_position
        assert isinstance(batch.images, Patches)
        assert isinstance(other.images, Patches)
        assert same(batch.images, other.images)
        assert torch.equal(batch.indices, other.indices)
        assert batch.images.shapes.prod(dim=1).max() <= batch.images.values.shape[1]
    for number in (0, 2, 5):
        after, _ = next(stream(root, whole[number][1]))
        assert torch.equal(after.indices, whole[number + 1][0].indices)
    ranks = [stream(root, rank=rank, world_size=3) for rank in range(3)]
    for batch, _ in whole:
        parts = [next(rank)[0] for rank in ranks]
        assert len({part.images.values.shape[1] for part in parts}) == 1  # pyright: ignore
        for rank, part in enumerate(parts):
            assert torch.equal(part.indices, batch.indices[rank::3])


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_leave_no_gap(tmp_path: Path, workers: int) -> None:
    root = make_pairs(tmp_path / "data", 6)
    (root / "002.png").write_bytes(b"no image")
    config = DataConfig(format="pairs", root=str(root), workers=workers)
    (batch,) = evaluation_batches(
        open_dataset(config), config, preprocess=NAFLEX, tokenizer=Tokenizer(12), batch_size=8
    )
    assert isinstance(batch.images, Patches)
    assert batch.indices.tolist() == [0, 1, 3, 4, 5]
    assert batch.images.values.shape == (5, 16, 48)
    assert batch.images.shapes.tolist() == [[4, 4]] * 5
    assert len(batch.bad) == 1
