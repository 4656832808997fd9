"""Positions of a ViT's patches: rotary in two dimensions, or a grid resized to each image.

Shapes: B batch, P patches, D width, H heads, h rows, w columns, n of either, g patches a side of
the grid.
"""

import math
from contextlib import nullcontext
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional as F

_THETA = 10_000


def rotary(side: int, head: int, *, class_token: bool, scaled_to: int | None) -> torch.Tensor:
    """Cosines and sines of rotary positions (2, [1 +] g², D/2H), as PE-Core's.

    The first half of a head's channels is rotated by the column, the other by the row, counted
    from 1 where there is a class token, which is not rotated.

    Args:
        side: g, patches a side.
        head: D/H, the channels of a head.
        class_token: whether there is one.
        scaled_to: the patches a side of another resolution, whose range the positions have.
    """
    frequencies = _THETA ** -(torch.arange(0, head // 2, 2) / (head // 2))  # (D/4H,)
    along = (torch.arange(side) + int(class_token)) * ((scaled_to or side) / side)  # (g,)
    row, column = torch.meshgrid(along, along, indexing="ij")
    places = torch.stack([column.flatten(), row.flatten()], dim=1)  # (g², 2)
    if class_token:
        places = F.pad(places, (0, 0, 1, 0))  # (1 + g², 2)
    angles = (places[..., None] * frequencies).flatten(1)  # ([1 +] g², D/2H)
    return torch.stack([angles.cos(), angles.sin()])


def resized(positions: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """A grid (g², D) resized to h rows and w columns, as SigLIP 2's NaFlex: (hw, D).

    Bilinear and antialiased, as two matrix products: within rounding of torch's `interpolate`,
    whose gradients on a GPU are summed in no fixed order.
    """
    side, device = math.isqrt(len(positions)), positions.device
    dtype = torch.promote_types(positions.dtype, torch.float32)
    is_meta = device.type == "meta"  # which autocast does not know
    with nullcontext() if is_meta else torch.autocast(device.type, enabled=False):
        rows, columns = (_weights(side, n).to(device, dtype) for n in (h, w))  # (h, g), (w, g)
        grid = positions.to(dtype).view(side, -1)  # (g, gD)
        table = columns @ (rows @ grid).view(h, side, -1)  # (h, w, D)
    return table.flatten(0, 1).to(positions.dtype)


def resized_to_each(positions: torch.Tensor, shapes: torch.Tensor, length: int) -> torch.Tensor:
    """A grid (g², D) resized to the patches of each image: (B, P, D).

    Args:
        positions: the grid, row by row.
        shapes: rows and columns of each image, (B, 2).
        length: P; what is after an image's patches is 0.
    """
    found, where = shapes.unique(dim=0, return_inverse=True)  # each shape is resized once
    tables = [F.pad(resized(positions, h, w), (0, 0, 0, length - h * w)) for h, w in found.tolist()]
    # an embedding: gradients of an index are summed in a fixed order
    each = F.embedding(where.to(positions.device), torch.stack(tables).flatten(1))
    return each.view(len(shapes), length, -1)


def _weights(side: int, size: int) -> torch.Tensor:
    """The matrix (n, g) that resizes a row of g values to n."""
    return torch.from_numpy(_triangles(side, size))


@lru_cache(4096)
def _triangles(side: int, size: int) -> np.ndarray:
    """As `_weights`; an array, which no mode of torch changes."""
    scale = side / size
    centers = (np.arange(size)[:, None] + 0.5) * scale  # (n, 1), in units of the grid
    distances = np.abs(np.arange(side) + 0.5 - centers) / max(1.0, scale)  # (n, g)
    weights = np.clip(1 - distances, 0, None)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
