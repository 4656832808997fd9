"""The `mixture` format: several sources in one stream, sampled by weight.

    data: {format: mixture, sources: [{format: ..., root: ..., weight: 3}, {...}]}

Each sample is drawn from a source with a probability proportional to its weight, and is the next
one in that source's own shuffled order, which is shuffled again when it ends.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count

import numpy as np

from leanclip.data.dataset import Dataset, Sample

_BLOCK = 1 << 14  # sources drawn at once


class Mixture(Dataset):
    """Samples of several sources; an index counts through the sources in order.

    Args:
        sources: the data sets.
        weights: of their samples in the stream; None: their sizes.
        epoch_size: samples of an epoch; None: the sum of the sizes.
    """

    def __init__(
        self,
        sources: Sequence[Dataset],
        weights: Sequence[float] | None = None,
        epoch_size: int | None = None,
    ) -> None:
        sizes = [len(source) for source in sources]
        self.sources, self.size = list(sources), epoch_size or sum(sizes)
        self.fractions = np.array(weights or sizes, float) / sum(weights or sizes)
        self.firsts = np.cumsum([0, *sizes])
        self.is_stream = any(source.is_stream for source in sources)
        if len(sources) == 1:
            (only,) = sources
            self.classes, self.templates, self.about = only.classes, only.templates, only.about

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        source = self._source_of(index)
        sample = self.sources[source][index - int(self.firsts[source])]
        return replace(sample, source=source)

    @property
    def distinct(self) -> int:
        """The number of samples of all sources."""
        return int(self.firsts[-1])

    def name(self, index: int) -> str:
        """As its source names it."""
        source = self._source_of(index)
        return self.sources[source].name(index - int(self.firsts[source]))

    def data_warnings(self) -> list[str]:
        """Those of all sources."""
        return [line for source in self.sources for line in source.data_warnings()]

    def visits(self, key: Sequence[int], start: int = 0) -> Iterator[int | Sample]:
        """Sources drawn by weight, and each one's next sample, from position `start` on."""
        before = np.zeros(len(self.sources), int)  # samples of each source before `start`
        block, skip = divmod(start, _BLOCK)
        for earlier in range(block):
            before += np.bincount(self._draws(key, earlier), minlength=len(before))
        draws = self._draws(key, block)
        before += np.bincount(draws[:skip], minlength=len(before))
        streams = [
            _endless(source, [*key, number], int(before[number]))
            for number, source in enumerate(self.sources)
        ]
        for position in range(start, self.size):
            if position % _BLOCK == 0:
                draws = self._draws(key, position // _BLOCK)
            source = int(draws[position % _BLOCK])
            visit = next(streams[source])
            if isinstance(visit, Sample):
                yield replace(visit, source=source)
            else:
                yield visit + int(self.firsts[source])

    def _draws(self, key: Sequence[int], block: int) -> np.ndarray:
        """The source of each position of a block."""
        rng = np.random.default_rng([*key, block])
        return rng.choice(len(self.fractions), _BLOCK, p=self.fractions)

    def _source_of(self, index: int) -> int:
        return int(np.searchsorted(self.firsts, index, side="right")) - 1


def _endless(source: Dataset, key: Sequence[int], start: int) -> Iterator[int | Sample]:
    """A source's samples from the `start`-th on, in a new order each epoch of the source."""
    done, start = divmod(start, len(source))
    for epoch in count(done):
        yield from source.visits([*key, epoch], start)
        start = 0
