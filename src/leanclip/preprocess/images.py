"""Images: bytes, a path or a PIL image -> (3, R, R) uint8, for evaluation and for training.

    evaluation: source -> whole image -> short side to R -> middle -> uint8
    training:   source -> random part -> R x R -> uint8

Pixels stay uint8 until they are on the device; `normalize` makes them what a model reads.

Shapes: B batch, R resolution.
"""

import io
import logging
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from PIL import Image

from leanclip.errors import SampleError, one_line
from leanclip.preprocess.decoding import MAX_PIXELS, Box, Source, open_image, open_part
from leanclip.preprocess.image_formats import FORMATS, SUFFIXES

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "FORMATS",
    "MAX_PIXELS",
    "SUFFIXES",
    "Preprocess",
    "Source",
    "as_jpeg",
    "center_crop",
    "evaluation_pixels",
    "image_to_show",
    "middle_square",
    "normalize",
    "open_image",
    "to_array",
    "training_pixels",
    "warn_not_shown",
]

log = logging.getLogger("leanclip")

MAX_LENGTH = 1 << 18  # of the long side when the short one is as the model wants it
SPARE = 1.5  # a crop decoded smaller keeps at least this many times the wanted side

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocess:
    """The evaluation transform of a model: `preprocess(image)` -> (3, R, R) float32.

    `evaluation_pixels`, in [0, 1], minus mean, over standard deviation.
    """

    resolution: int = 224
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __call__(self, source: Source) -> torch.Tensor:
        """Read, crop and normalise one image.

        Raises:
            SampleError: the image cannot be read.
        """
        pixels = torch.from_numpy(evaluation_pixels(source, self.resolution))
        return normalize(pixels[None], self.mean, self.std)[0]


def evaluation_pixels(
    source: Source, resolution: int, *, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Short side to R by Pillow's antialiased bicubic, the square in the middle: (3, R, R) uint8.

    Equal to the bit to the transform of OpenAI's CLIP for upright 8-bit RGB and greyscale images
    (other kinds become RGB before the resize here, after it there; see decoding.py). For that it
    never decodes a smaller image, and does not use torch's resize, which is several times
    faster and differs by one grey level in 0.1 to 0.9% of the values.

    Raises:
        SampleError: the image cannot be read, or is too long for its width.
    """
    return to_array(center_crop(open_image(source, max_pixels=max_pixels), resolution))


def training_pixels(
    source: Source | np.ndarray,
    resolution: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    scaled_decoding: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """A random resized crop: a part of the image, of `scale` of its area and `ratio` of sides.

    (3, R, R) uint8, by torch's antialiased bicubic on uint8 of the part alone: within one grey
    level of Pillow's crop and resize where it shrinks, two where it enlarges. The part is drawn
    on the upright image's full size, whatever size is decoded.

    `source` may also be upright RGB already, (height, width, 3) uint8.

    `scaled_decoding`: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, the smallest at which
    both sides of the part keep at least 1.5 R pixels; its edges then move by half a decoded
    pixel at most, a third of a final one. Where they do not move, pixels of sharp photographs
    differ from the full decode's by 0.3 to 0.8 grey levels on average at 1/2, 0.3 to 1.3 at 1/4
    and 0.4 to 2.0 at 1/8; where they do, by 1 to 3.

    Raises:
        SampleError: the image cannot be read.
    """

    def choose(width: int, height: int) -> tuple[Box, int]:
        box = draw_box(width, height, rng, scale=scale, ratio=ratio)
        return box, decoding_factor(box, resolution) if scaled_decoding else 1

    return resized(open_part(source, choose, max_pixels=max_pixels), resolution)


def resized(part: np.ndarray, resolution: int) -> np.ndarray:
    """(height, width, 3) uint8 -> (3, R, R) uint8 by torch's antialiased bicubic."""
    part = np.ascontiguousarray(part)  # torch has no mirrored views, and would copy others slower
    pixels = torch.from_numpy(part).permute(2, 0, 1)[None]  # channels last: the vectorised path
    pixels = torch.nn.functional.interpolate(
        pixels, size=(resolution, resolution), mode="bicubic", antialias=True
    )
    return np.ascontiguousarray(pixels[0].numpy())


def decoding_factor(box: Box, resolution: int, spare: float = SPARE) -> int:
    """By how much a JPEG may be decoded smaller for a part of it to be resized to R x R.

    Its short side then has at least `spare` times R pixels.
    """
    left, top, right, bottom = box
    short = min(right - left, bottom - top)
    return next((f for f in (8, 4, 2) if short >= f * spare * resolution), 1)


def center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """Short side to `resolution` by antialiased bicubic, then the square in the middle.

    Raises:
        SampleError: the sides differ so much that the long one would be over MAX_LENGTH.
    """
    width, height = image.size
    short = min(width, height)
    size = (resolution * width // short, resolution * height // short)
    if max(size) > MAX_LENGTH:
        reason = f"an image of {width}x{height} pixels is too long for its other side"
        raise SampleError("too long image", reason)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((side - resolution) / 2) for side in size)
    return image.crop((left, top, left + resolution, top + resolution))


def image_to_show(source: Source) -> Image.Image | None:
    """The image for a picture or a page; None, with a warning, where it cannot be read."""
    if source == b"":  # a warning is logged already
        return None
    try:
        return open_image(source)
    except (SampleError, OSError, MemoryError) as error:
        warn_not_shown(one_line(error))
        return None


@lru_cache(1000)
def warn_not_shown(reason: str) -> None:
    """Log, once, why an image is left out of pictures."""
    log.warning("not shown: %s", reason)


def middle_square(image: Image.Image) -> Box:
    """Where the largest square in the middle of an image lies."""
    short = min(image.size)
    left, top = ((side - short) // 2 for side in image.size)
    return left, top, left + short, top + short


def draw_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    """Where a random resized crop lies, drawn as torchvision's RandomResizedCrop draws it.

    Where ten draws do not fit, it is the largest centred part within the ratios.
    """
    least, spread = scale[0], scale[1] - scale[0]
    narrowest, span = _logarithms(ratio)
    for _ in range(10):
        area = width * height * (least + spread * rng.random())  # as `uniform`, which takes longer
        aspect = float(np.exp(narrowest + span * rng.random()))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            break
    else:
        w = min(width, max(1, round(height * ratio[1])))
        h = min(height, max(1, round(width / ratio[0])))
        left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


@cache
def _logarithms(ratio: tuple[float, float]) -> tuple[float, float]:
    """The lesser ratio's logarithm, and how much more the greater's is."""
    least, most = np.log(ratio).tolist()
    return least, most - least


def as_jpeg(image: Image.Image, quality: int = 88) -> bytes:
    """An RGB image as a JPEG with nothing in it but the pixels."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def to_array(image: Image.Image) -> np.ndarray:
    """An RGB image -> (3, height, width) uint8."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def normalize(
    pixels: torch.Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> torch.Tensor:
    """uint8 pixels (B, 3, R, R) -> (pixels / 255 - mean) / std, float32, on their device."""
    pixels = pixels.float().div_(255)
    mean_, std_ = (pixels.new_tensor(v).view(3, 1, 1) for v in (mean, std))
    return pixels.sub_(mean_).div_(std_)
