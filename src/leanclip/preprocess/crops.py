"""Random resized crops for training: source -> a part of it -> (3, R, R) or (3, ph, pw) uint8.

Shapes: R resolution, h rows and w columns of patches of p pixels a side.
"""

import numpy as np
import torch

from leanclip.preprocess.decoding import MAX_PIXELS, Box, Source, open_part
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.patches import patched_size

SPARE = 1.5  # scaled decoding keeps at least this many times the wanted side


def training_pixels(
    source: Source,
    preprocess: Preprocess,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    scaled_decoding: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """A random resized crop, (3, R, R) or (3, ph, pw) uint8, by torch's antialiased bicubic.

    Within one grey level of Pillow's crop and resize where it shrinks, two where it enlarges.

    Args:
        source: an image.
        preprocess: of the model, whose size or patches are used.
        rng: draws the crop, on the size of the whole upright image.
        scale: the range of the crop's fraction of the area.
        ratio: the range of its width over its height, which the resize to a square then distorts;
            with naflex, as a multiple of the image's, and nothing is distorted.
        scaled_decoding: decode a JPEG at 1/2, 1/4 or 1/8 of its size, the smallest that leaves
            the crop 1.5 times the wanted pixels a side. Its edges move by half a decoded pixel at
            most, a third of a final one. The mean difference from the full decode of sharp
            photographs is 0.3 to 0.8 grey levels at 1/2, 0.3 to 1.3 at 1/4, 0.4 to 2.0 at 1/8, and
            1 to 3 where edges move.
        max_pixels: an image of more is refused.

    Raises:
        SampleError: the image cannot be read.
    """

    def choose(width: int, height: int) -> tuple[Box, int]:
        own = width / height if preprocess.is_naflex else 1.0
        box = draw_box(width, height, rng, scale=scale, ratio=(ratio[0] * own, ratio[1] * own))
        left, top, right, bottom = box
        wanted = min(_size_of_crop(bottom - top, right - left, preprocess))
        return box, decoding_factor(box, wanted) if scaled_decoding else 1

    part = open_part(source, choose, max_pixels=max_pixels)
    height, width, _ = part.shape
    return resized(part, _size_of_crop(height, width, preprocess))


def _size_of_crop(height: int, width: int, preprocess: Preprocess) -> tuple[int, int]:
    """Height and width that a crop of these is resized to."""
    if preprocess.patch_size is None or preprocess.max_patches is None:
        return preprocess.resolution, preprocess.resolution
    return patched_size(height, width, preprocess.patch_size, preprocess.max_patches)


def resized(part: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(height, width, 3) uint8 -> (3, *size) uint8 by torch's antialiased bicubic.

    `size` is (height, width).
    """
    part = np.ascontiguousarray(part)  # torch has no negative strides, and copies others slowly
    pixels = torch.from_numpy(part).permute(2, 0, 1)[None]  # channels last: vectorised
    pixels = torch.nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True)
    return np.ascontiguousarray(pixels[0].numpy())


def decoding_factor(box: Box, resolution: int, spare: float = SPARE) -> int:
    """The fraction of its size, 1 / factor, at which a JPEG is decoded for a crop resized to R x R.

    The crop's short side keeps at least `spare` times R pixels.
    """
    left, top, right, bottom = box
    short = min(right - left, bottom - top)
    return next((f for f in (8, 4, 2) if short >= f * spare * resolution), 1)


def draw_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    """The box of a random resized crop, drawn as by torchvision's RandomResizedCrop.

    After ten draws that do not fit, the largest centred box within the ratios.
    """
    low, span = np.log(ratio[0]), np.log(ratio[1]) - np.log(ratio[0])
    for _ in range(10):  # rng.uniform takes longer
        area = width * height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = float(np.exp(low + span * rng.random()))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            break
    else:
        w = min(width, max(1, round(height * ratio[1])))
        h = min(height, max(1, round(width / ratio[0])))
        left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
