"""Images of different sizes as sequences of patches, for models with resized positions (NaFlex).

    (height, width) -> the size with the most patches -> pixels (3, ph, pw) -> rows of `Patches`

Shapes: B batch, P the most patches of an image, p patch size, h rows, w columns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from leanclip.errors import ConfigError

_SCALES, _PRECISION = (1e-6, 100.0), 1e-5  # of the search for a size, as in SigLIP 2's processor


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
        mask = positions < self.shapes.prod(dim=1)[:, None]
        return mask.to(self.values.device, non_blocking=True)

    def to(self, *args: Any, **options: Any) -> "Patches":
        """With the values on another device or of another type."""
        return replace(self, values=self.values.to(*args, **options))

    def split(self, size: int) -> tuple["Patches", ...]:
        """Parts of at most `size` images."""
        parts = zip(self.values.split(size), self.shapes.split(size), strict=True)
        return tuple(Patches(values, shapes) for values, shapes in parts)

    def tensor_split(self, count: int) -> tuple["Patches", ...]:
        """So many parts of nearly equal size, some of which may be empty."""
        both = (self.values.tensor_split(count), self.shapes.tensor_split(count))
        return tuple(Patches(values, shapes) for values, shapes in zip(*both, strict=True))

    def pin_memory(self) -> "Patches":
        """With the values in page-locked memory."""
        return replace(self, values=self.values.pin_memory())

    def pixels(self) -> torch.Tensor:
        """The pixels of images of one shape: (B, 3, ph, pw).

        Raises:
            ConfigError: their shapes differ.
        """
        if len(self.shapes.unique(dim=0)) != 1:
            raise ConfigError("patches of images of several shapes; give those of one image")
        h, w = self.shapes[0].tolist()
        side = math.isqrt(self.values.shape[-1] // 3)
        grid = self.values[:, : h * w].reshape(-1, h, w, side, side, 3)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, h * side, w * side)

    def blank(self) -> "Patches":
        """One image of one black patch, as long as these."""
        values = self.values.new_zeros(1, *self.values.shape[1:])
        return Patches(values, torch.ones(1, 2, dtype=torch.int64))


def patched_size(height: int, width: int, patch_size: int, max_patches: int) -> tuple[int, int]:
    """Height and width, multiples of p, with the most patches in an image's proportions.

    Both sides are scaled alike and rounded up to whole patches. The scale is found by bisection, to
    the same bit as by SigLIP 2's processor in big_vision and transformers.
    """

    def sides(scale: float) -> tuple[int, int]:
        h, w = (max(1, math.ceil(side * scale / patch_size)) for side in (height, width))
        return h * patch_size, w * patch_size

    low, high = _SCALES
    while high - low >= _PRECISION:
        scale = (low + high) / 2
        h, w = sides(scale)
        if (h // patch_size) * (w // patch_size) <= max_patches:
            low = scale
        else:
            high = scale
    return sides(low)


def write_patches(pixels: np.ndarray, patch_size: int, into: np.ndarray) -> tuple[int, int]:
    """Write an image (3, ph, pw) as a row of `Patches.values`, (P, 3p²); padding is 0.

    Returns:
        Rows and columns of patches.
    """
    h, w = (side // patch_size for side in pixels.shape[1:])
    grid = pixels.reshape(3, h, patch_size, w, patch_size).transpose(1, 3, 2, 4, 0)
    into[: h * w].reshape(h, w, patch_size, patch_size, 3)[...] = grid
    into[h * w :] = 0
    return h, w


def stack_patches(images: Sequence[np.ndarray], patch_size: int, max_patches: int) -> Patches:
    """Images (3, ph, pw) uint8 of any sizes, of at most P patches each."""
    values = np.empty((len(images), max_patches, 3 * patch_size**2), np.uint8)
    pairs = zip(images, values, strict=True)
    shapes = [write_patches(image, patch_size, row) for image, row in pairs]
    return Patches(torch.from_numpy(values), torch.tensor(shapes, dtype=torch.int64).view(-1, 2))
