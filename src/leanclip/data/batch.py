"""A batch of image-text pairs, and its position in the stream of batches.

Shapes: B batch, L tokens, E embedding, R resolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from leanclip.data.skipped import Bad
from leanclip.preprocess.patches import Patches
from leanclip.preprocess.text import Tokenizer

TEXT_LENGTHS = (8, 16, 24, 32, 48, 64)  # tokens are padded to one of these, or to the context


class Position(NamedTuple):
    """How far a stream of batches has been read."""

    epoch: int = 0
    sample: int = 0  # samples of this epoch already read, over all ranks


def _no_numbers() -> torch.Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass
class Batch:
    """Image-text pairs, ready for the device; unusable samples are left out and listed in `bad`."""

    images: torch.Tensor | Any  # (B, 3, R, R) uint8; (B, E): unit features, tower locked
    tokens: torch.Tensor  # (B, L) int64, cut to the longest caption; or (B, E) as above
    indices: torch.Tensor  # (B,) int64, of the samples in their data set; -1 in a stream
    labels: torch.Tensor  # (B,) int64, of class data; -1 elsewhere
    sources: torch.Tensor = field(default_factory=_no_numbers)  # (B,) int64, index in a mixture
    groups: torch.Tensor = field(
        default_factory=_no_numbers
    )  # (B,) int64, one per caption or class
    captions: list[Sequence[str]] = field(default_factory=list)  # all of them, in evaluation
    digests: torch.Tensor = field(default_factory=_no_numbers)  # (B,) int64, of image file and text
    bad: list[Bad] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.indices)

    def __getstate__(self) -> dict[str, Any]:
        """Arrays in place of tensors, which would cross between processes by file descriptors."""
        state = vars(self).copy()
        if isinstance(self.images, Patches):
            state |= {"images": self.images.values, "shapes": self.images.shapes}
        return {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in state.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            is_array = isinstance(value, np.ndarray)
            setattr(self, name, torch.from_numpy(value) if is_array else value)
        if (shapes := self.__dict__.pop("shapes", None)) is not None:
            self.images = Patches(self.images, shapes)  # pyright: ignore[reportArgumentType]

    def pin_memory(self) -> "Batch":
        """Copy images and tokens to page-locked memory, for asynchronous copies to a GPU."""
        self.images, self.tokens = self.images.pin_memory(), self.tokens.pin_memory()
        return self


def trim(tokens: torch.Tensor, tokenizer: Tokenizer) -> torch.Tensor:
    """(B, L) -> (B, L') with L' at least the longest caption: the features do not change.

    L' is one of TEXT_LENGTHS or L, so that compiled graphs are reused.
    """
    longest = int(tokenizer.lengths(tokens).max()) if len(tokens) else 1
    return tokens[:, : next((n for n in TEXT_LENGTHS if n >= longest), tokens.shape[1])]
