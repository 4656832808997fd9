"""How many samples each batch has, and for NaFlex how many patches: of the seed and position alone.

    samples, batch size, lengths -> batches of each length in an epoch -> drawn order -> `rest`

A batch of images of fewer patches has more of them, so that every batch has about as many patches.
Each length has as many batches in an epoch as the others, but for the last few samples; the order
of the lengths is drawn for each epoch, the same on all ranks. All epochs have as many batches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from leanclip.data.batch import Position

_KEY = 0x6E61666C  # of these draws, apart from those of crops


class BatchSize(NamedTuple):
    """The size of a batch over all ranks."""

    samples: int
    patches: int | None  # of each image at most; None: all batches are alike


@dataclass(frozen=True)
class BatchSizes:
    """The sizes of the batches of a run.

    Args:
        dataset: samples per epoch.
        batch_size: samples of a batch; with several lengths, of the longest.
        seed: of the order of the lengths.
        lengths: patches that images may have; none: all batches are alike.
    """

    dataset: int
    batch_size: int
    seed: int
    lengths: tuple[int, ...] = ()

    @property
    def sizes(self) -> list[BatchSize]:
        """Those of each length, the largest batch first."""
        if not self.lengths:
            return [BatchSize(min(self.batch_size, self.dataset), None)]
        budget = self.batch_size * max(self.lengths)  # patches of a batch
        found = [BatchSize(min(budget // n, self.dataset), n) for n in self.lengths]
        return sorted(found, reverse=True)

    @property
    def counts(self) -> list[int]:
        """The batches of each size in an epoch; fewer samples than the smallest batch are left."""
        samples = [size.samples for size in self.sizes]
        rounds, left = divmod(self.dataset, sum(samples))
        counts = [rounds] * len(samples)
        for place, one in enumerate(samples):
            more, left = divmod(left, one)
            counts[place] += more
        return counts

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """The mean number of samples of a batch."""
        pairs = zip(self.counts, self.sizes, strict=True)
        return sum(count * size.samples for count, size in pairs) / self.steps_per_epoch

    def rest(self, position: Position) -> Sequence[BatchSize]:
        """The batches of an epoch after a position in it; what is left at its end is dropped."""
        sizes, room = self.sizes, self.dataset - position.sample
        if len(sizes) == 1:
            return [sizes[0]] * max(0, room // sizes[0].samples)
        kinds = np.repeat(np.arange(len(sizes)), self.counts)
        order = np.random.default_rng([self.seed, position.epoch, _KEY]).permutation(kinds)
        ends = np.cumsum(np.array([size.samples for size in sizes])[order])
        # Between two batches, where other sizes were used before, the next one goes on from there.
        first = int(np.searchsorted(ends, position.sample, side="right"))
        fits = ends[first:] - (ends[first - 1] if first else 0) <= room
        return [sizes[kind] for kind in order[first:][fits].tolist()]

    def batches(self, start: Position) -> Iterator[tuple[BatchSize, Position, Position]]:
        """The batches without end, each with the positions before and after it."""
        position = start
        while True:
            rest = self.rest(position)
            for number, size in enumerate(rest, 1):
                before = position
                position = Position(before.epoch, before.sample + size.samples)
                if number == len(rest):
                    position = Position(before.epoch + 1, 0)
                yield size, before, position
            if not rest:  # a larger batch than at the checkpoint
                position = Position(position.epoch + 1, 0)
