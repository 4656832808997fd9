"""Images of different sizes as sequences of patches, for models with resized positions (NaFlex).

Shapes: B batch, P the most patches of an image, p patch size.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Patches:
    """The patches of images, row by row; those after an image's last are padding.

    A patch is (row, column, channel), flattened.
    """

    values: torch.Tensor  # (B, P, 3p²): uint8, or normalised floats
    shapes: torch.Tensor  # (B, 2) int64 on the CPU: rows and columns of patches

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice | torch.Tensor) -> "Patches":
        """Some of the images."""
        return Patches(self.values[rows], self.shapes[rows])

    @property
    def mask(self) -> torch.Tensor:
        """Whether a patch belongs to an image: (B, P) bool, on the device of the values."""
        positions = torch.arange(self.values.shape[1])
        return (positions < self.shapes.prod(dim=1)[:, None]).to(self.values.device)

    def to(self, *args: Any, **options: Any) -> "Patches":
        """With the values on another device or of another type."""
        return replace(self, values=self.values.to(*args, **options))

    def split(self, size: int) -> tuple["Patches", ...]:
        """Parts of at most `size` images."""
        parts = zip(self.values.split(size), self.shapes.split(size), strict=True)
        return tuple(Patches(values, shapes) for values, shapes in parts)

    def pin_memory(self) -> "Patches":
        """With the values in page-locked memory."""
        return replace(self, values=self.values.pin_memory())
