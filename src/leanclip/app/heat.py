"""An attention map drawn over an image, as a JPEG. Shapes: h x w cells of the map."""

import numpy as np
from matplotlib import colormaps
from PIL import Image

from leanclip.preprocess.images import Preprocess, encode_jpeg, view

SIDE = 448  # pixels of the long side
MIN_OPACITY, MAX_OPACITY = 0.15, 0.75


def heat_picture(
    image: Image.Image, heat: np.ndarray, preprocess: Preprocess | None = None
) -> bytes:
    """What the model saw of an image, under a map (h, w)."""
    picture = view(image, preprocess or Preprocess(), SIDE)
    seen = np.asarray(picture, dtype=np.float32)
    scaled = (heat - heat.min()) / max(float(np.ptp(heat)), 1e-12)
    smooth = Image.fromarray(scaled.astype(np.float32)).resize(
        picture.size, Image.Resampling.BILINEAR
    )
    x = np.clip(np.asarray(smooth), 0, 1)  # (height, width)
    color = 255 * colormaps["plasma"](x)[..., :3]
    opacity = (MIN_OPACITY + (MAX_OPACITY - MIN_OPACITY) * x)[..., None]
    mixed = seen * (1 - opacity) + color * opacity
    return encode_jpeg(Image.fromarray(mixed.round().astype(np.uint8)))
