"""Images: bytes, a path or a PIL image -> (3, R, R) uint8, and the transforms in between.

    source -> open_image -> RGB -> center_crop (evaluation) or random_crop (training) -> uint8

Pixels stay uint8 until they are on the device; `normalize` makes them what a model reads.

Shapes: B batch, R resolution.
"""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from leanclip.errors import DataError, SampleError

Source = str | Path | bytes | Image.Image

# Names the decoders that may run: Pillow would otherwise hand EPS files to Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
MAX_PIXELS = 178_956_970  # Pillow's own bound for "decompression bomb" errors
MAX_LENGTH = 1 << 18  # of the long side when the short one is as the model wants it

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocess:
    """The evaluation transform of a model: `preprocess(image)` -> (3, R, R) float32.

    Equal to the transform of OpenAI's CLIP for opaque images (transparent parts become white
    here, what they hide there): RGB, short side to R by Pillow's antialiased
    bicubic, centre crop, [0, 1], minus mean, over standard deviation.
    """

    resolution: int = 224
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __call__(self, source: Source) -> torch.Tensor:
        """Read, crop and normalise one image.

        Raises:
            DataError: the image cannot be read.
        """
        pixels = torch.from_numpy(to_array(center_crop(open_image(source), self.resolution)))
        return normalize(pixels[None], self.mean, self.std)[0]


def open_image(source: Source, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in RGB, transparent parts on white.

    Raises:
        DataError: there is no such file, it is no image, it is damaged, or its header
            declares more than `max_pixels` pixels.
    """
    name = source if isinstance(source, str | Path) else f"<{type(source).__name__}>"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of bombs; max_pixels refuses them
            image = _open(source)
            if image.width * image.height > max_pixels:
                size = f"{image.width}x{image.height}"
                raise SampleError(
                    "too many pixels", f"{name}: {size} pixels are over the limit of {max_pixels}"
                )
            return _to_rgb(image)
    except FileNotFoundError:
        raise SampleError("missing file", f"{name}: no such image") from None
    except DataError:
        raise
    except Exception as error:  # decoders raise many kinds on damaged files
        raise SampleError("damaged image", f"{name}: cannot be read as an image: {error}") from None


def center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """Short side to `resolution` by antialiased bicubic, then the square in the middle.

    Raises:
        DataError: the sides differ so much that the long one would be over MAX_LENGTH.
    """
    width, height = image.size
    short = min(width, height)
    size = (resolution * width // short, resolution * height // short)
    if max(size) > MAX_LENGTH:
        raise SampleError(
            "too long image", f"an image of {width}x{height} pixels is too long for its other side"
        )
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((side - resolution) / 2) for side in size)
    return image.crop((left, top, left + resolution, top + resolution))


def random_crop(
    image: Image.Image,
    resolution: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Image.Image:
    """A random resized crop: a part of the image, of `scale` of its area and `ratio` of sides.

    The sides are drawn as torchvision's RandomResizedCrop draws them; where ten draws do not
    fit, the largest centred crop within the ratios is taken.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(*np.log(ratio)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            break
    else:
        w = min(width, round(height * ratio[1]))
        h = min(height, round(width / ratio[0]))
        left, top = (width - w) // 2, (height - h) // 2
    box = (left, top, left + w, top + h)
    return image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)


def evaluation_pixels(
    source: Source, resolution: int, *, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """The evaluation transform: (3, R, R) uint8."""
    return to_array(center_crop(open_image(source, max_pixels=max_pixels), resolution))


def training_pixels(
    source: Source,
    resolution: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    scaled_decoding: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """A random resized crop: (3, R, R) uint8."""
    image = open_image(source, max_pixels=max_pixels)
    return to_array(random_crop(image, resolution, rng, scale=scale, ratio=ratio))


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


def _open(source: Source) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
