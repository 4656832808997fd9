"""A batch of pairs, and its place in the stream of batches.

Shapes: B batch, L tokens, E embedding, R resolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from leanclip.data.skipped import Bad
from leanclip.preprocess.tokenizer import END

TEXT_LENGTHS = (8, 16, 24, 32, 48, 64)  # what a batch is cut to; below a whole context


class Position(NamedTuple):
    """How far a stream of batches has gone."""

    epoch: int = 0
    sample: int = 0  # samples of this epoch that are done, over all ranks


@dataclass
class Batch:
    """Pairs, ready for the device; unusable samples are left out and named in `bad`."""

    images: torch.Tensor  # (B, 3, R, R) uint8; or (B, E), a locked tower's unit features
    tokens: torch.Tensor  # (B, L) int64, cut to the longest caption; or (B, E) as above
    indices: torch.Tensor  # (B,) int64, of the samples in their data set; -1 in a stream
    labels: torch.Tensor  # (B,) int64, of class data; -1 elsewhere
    sources: torch.Tensor = field(  # (B,) int64, which one of a mixture
        default_factory=lambda: torch.empty(0, dtype=torch.int64)
    )
    groups: torch.Tensor = field(  # (B,) int64, equal for the same caption or class
        default_factory=lambda: torch.empty(0, dtype=torch.int64)
    )
    captions: list[Sequence[str]] = field(default_factory=list)  # all of them, in evaluation
    digests: torch.Tensor = field(  # (B,) int64, of image files and their words, in evaluation
        default_factory=lambda: torch.empty(0, dtype=torch.int64)
    )
    bad: list[Bad] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.indices)

    def __getstate__(self) -> dict[str, Any]:
        """On the way from a worker: of all tensors only the images are worth shared memory."""
        small = {k: v.numpy() for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return vars(self) | small | {"images": self.images}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            is_array = isinstance(value, np.ndarray)
            setattr(self, name, torch.from_numpy(value) if is_array else value)

    def pin_memory(self) -> "Batch":
        """In page-locked memory, from where a copy to a GPU need not be waited for."""
        self.images, self.tokens = self.images.pin_memory(), self.tokens.pin_memory()
        return self


def advance(position: Position, size: int, batch_size: int) -> Position:
    """The position after a batch; what does not fill a batch at an epoch's end is left out."""
    epoch, sample = position.epoch, position.sample + batch_size
    return Position(epoch, sample) if sample + batch_size <= size else Position(epoch + 1, 0)


def trim(tokens: torch.Tensor) -> torch.Tensor:
    """(B, L) -> (B, L') with L' a little over the longest caption: the features are the same.

    Lengths are rounded up to a few, so that compiled graphs are reused.
    """
    longest = int((tokens == END).int().argmax(dim=1).max()) + 1 if len(tokens) else 1
    return tokens[:, : next((n for n in TEXT_LENGTHS if n >= longest), tokens.shape[1])]
