"""From a data set to batches, as a function of (seed, position) alone.

    order of the epoch -> keys (epoch, index) -> workers: read, crop, choose a caption -> Batch

What a sample looks like depends on the seed, the epoch and its index, not on which worker reads
it or when: the position alone rebuilds the stream.

Shapes: B batch, L tokens, R resolution.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from leanclip.config import DataConfig
from leanclip.data.samples import Dataset
from leanclip.errors import DataError
from leanclip.images import center_crop, open_image, random_crop, to_array
from leanclip.tokenizer import END, tokenize

TEXT_LENGTHS = (8, 16, 24, 32, 48, 64)  # what a batch is cut to; below a whole context


class Position(NamedTuple):
    """How far a stream of batches has gone."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done


@dataclass
class Batch:
    """Pairs, ready for the device; unreadable samples are left out and named in `bad`."""

    images: torch.Tensor  # (B, 3, R, R) uint8
    tokens: torch.Tensor  # (B, L) int64, cut to the longest caption
    indices: torch.Tensor  # (B,) int64, of the samples in their data set
    labels: torch.Tensor  # (B,) int64, of class data; -1 elsewhere
    bad: list[tuple[str, str]] = field(default_factory=list)  # (id, reason)

    def __len__(self) -> int:
        return len(self.indices)


class BadSamples:
    """Counts what could not be read, and stops the run when it is more than was allowed."""

    def __init__(
        self, dataset_size: int, max_share: float, before: Mapping[str, str] | None = None
    ) -> None:
        self.allowed, self.size, self.share = int(max_share * dataset_size), dataset_size, max_share
        self.reasons = dict(before or {})

    def add(self, bad: Sequence[tuple[str, str]]) -> list[str]:
        """Note unreadable samples; gives the reasons of those not seen before.

        Raises:
            DataError: more than the allowed share of the data set is unreadable.
        """
        new = {name: reason for name, reason in bad if name not in self.reasons}
        self.reasons |= new
        if len(self.reasons) > self.allowed:
            last = next(reversed(self.reasons.values()))
            raise DataError(
                f"{last} (that makes {len(self.reasons)} bad of {self.size} samples, over "
                f"data.max_bad_share={self.share:g}; mend them or raise the share)"
            )
        return list(new.values())


def batches_per_epoch(size: int, batch_size: int) -> int:
    """Whole batches of an epoch; a data set smaller than a batch is one batch."""
    return max(1, size // batch_size)


def training_batches(
    dataset: Dataset,
    config: DataConfig,
    *,
    resolution: int,
    context_length: int,
    truncate: bool,
    batch_size: int,
    seed: int,
    start: Position = Position(),  # noqa: B008, a constant
) -> Iterator[tuple[Batch, Position]]:
    """Shuffled batches without end, from `start`, each with the position after it."""
    per_epoch = batches_per_epoch(len(dataset), batch_size)
    reader = _Reader(dataset, config, resolution, context_length, truncate, seed)
    keys = _training_keys(len(dataset), per_epoch, batch_size, seed, start)
    epoch, done = start
    for batch in _load(reader, keys, config.workers):
        done += 1
        if done == per_epoch:
            epoch, done = epoch + 1, 0
        yield batch, Position(epoch, done)


def evaluation_batches(
    dataset: Dataset,
    config: DataConfig,
    *,
    resolution: int,
    context_length: int,
    batch_size: int,
    limit: int | None = None,
) -> Iterator[Batch]:
    """Every sample once, in order, centre-cropped, with its first caption."""
    size = min(len(dataset), limit or len(dataset))
    reader = _Reader(dataset, config, resolution, context_length, True, None)
    keys = [
        [(0, index) for index in range(first, min(first + batch_size, size))]
        for first in range(0, size, batch_size)
    ]
    yield from _load(reader, iter(keys), config.workers)


def trim(tokens: torch.Tensor) -> torch.Tensor:
    """(B, L) -> (B, L') with L' a little over the longest caption: the features are the same.

    Lengths are rounded up to a few, so that compiled graphs are reused.
    """
    longest = int((tokens == END).int().argmax(dim=1).max()) + 1 if len(tokens) else 1
    return tokens[:, : next((n for n in TEXT_LENGTHS if n >= longest), tokens.shape[1])]


def _training_keys(
    size: int, per_epoch: int, batch_size: int, seed: int, start: Position
) -> Iterator[list[tuple[int, int]]]:
    """Batches of (epoch, index), in an order drawn anew for each epoch."""
    epoch, first = start
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(size)
        for batch in range(first, per_epoch):
            chosen = order[batch * batch_size : (batch + 1) * batch_size]
            yield [(epoch, int(index)) for index in chosen]
        epoch, first = epoch + 1, 0


def _load(
    reader: "_Reader", keys: Iterator[list[tuple[int, int]]], workers: int | None
) -> Iterator[Batch]:
    if workers is None:
        workers = min(8, len(os.sched_getaffinity(0)))
    loader = DataLoader(
        reader,  # pyright: ignore[reportArgumentType]: keys are pairs, and it needs no length
        batch_sampler=keys,  # pyright: ignore[reportArgumentType]: an iterator will do
        collate_fn=_collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
    yield from loader


class _Read(NamedTuple):
    image: np.ndarray
    tokens: torch.Tensor
    key: int  # the sample's index; a tuple has a method of that name
    label: int


class _Reader:
    """Reads the sample of a key; runs in the workers. `seed` None: the evaluation transform."""

    def __init__(
        self,
        dataset: Dataset,
        config: DataConfig,
        resolution: int,
        context_length: int,
        truncate: bool,
        seed: int | None,
    ) -> None:
        self.dataset, self.config, self.seed = dataset, config, seed
        self.resolution, self.context_length = resolution, context_length
        self.truncate = truncate

    def __getitem__(self, key: tuple[int, int]) -> _Read | tuple[str, str]:
        epoch, index = key
        sample = self.dataset[index]
        try:
            image = open_image(sample.image, max_pixels=self.config.max_pixels)
            caption = sample.captions[0]
            if self.seed is None:
                image = center_crop(image, self.resolution)
            else:
                rng = np.random.default_rng([self.seed, epoch, index])
                caption = sample.captions[int(rng.integers(len(sample.captions)))]
                scale, ratio = self.config.crop_scale, self.config.crop_ratio
                image = random_crop(image, self.resolution, rng, scale=scale, ratio=ratio)
            tokens = tokenize(caption, self.context_length, truncate=self.truncate)[0]
        except DataError as error:
            reason = str(error)
            return sample.id, reason if sample.id in reason else f"{sample.id}: {reason}"
        return _Read(to_array(image), tokens, index, -1 if sample.label is None else sample.label)


def _collate(items: list[_Read | tuple[str, str]]) -> Batch:
    good = [item for item in items if isinstance(item, _Read)]
    bad = [item for item in items if not isinstance(item, _Read)]
    if not good:
        none = torch.empty(0, dtype=torch.int64)
        return Batch(torch.empty(0, 3, 1, 1, dtype=torch.uint8), none.view(0, 1), none, none, bad)
    return Batch(
        torch.from_numpy(np.stack([item.image for item in good])),
        trim(torch.stack([item.tokens for item in good])),
        torch.tensor([item.key for item in good]),
        torch.tensor([item.label for item in good]),
        bad,
    )
