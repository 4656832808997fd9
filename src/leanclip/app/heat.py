"""An image under its map of where the model looked, as a JPEG.

Shapes: h x w places of a map.
"""

import numpy as np
from PIL import Image

from leanclip.preprocess.images import Preprocess, as_jpeg, view

SIDE = 448  # pixels
# From nothing to the most: dark violet, red, orange, yellow; told apart in greys as well.
COLOURS = np.array([[13, 8, 135], [156, 23, 158], [237, 121, 83], [240, 249, 33]], dtype=np.float32)
OPACITY = (0.15, 0.75)


def heat_picture(
    image: Image.Image, heat: np.ndarray, preprocess: Preprocess | None = None
) -> bytes:
    """What the model saw of an image, under a map (h, w)."""
    seen = view(image, preprocess or Preprocess(), SIDE)
    share = heat.astype(np.float32) - heat.min()
    share = share / share.max() if share.max() > 0 else share
    smooth = Image.fromarray(share).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    x = np.clip(np.asarray(smooth), 0, 1)[..., None]  # (SIDE, SIDE, 1)
    place = x * (len(COLOURS) - 1)
    lower = np.minimum(place.astype(int), len(COLOURS) - 2)[..., 0]
    between = place - lower[..., None]
    colour = COLOURS[lower] * (1 - between) + COLOURS[lower + 1] * between
    opacity = OPACITY[0] + (OPACITY[1] - OPACITY[0]) * x
    mixed = np.asarray(seen, dtype=np.float32) * (1 - opacity) + colour * opacity
    return as_jpeg(Image.fromarray(mixed.round().astype(np.uint8)))
