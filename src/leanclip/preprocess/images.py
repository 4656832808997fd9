"""Images: bytes, a path or a PIL image -> (3, R, R) uint8, for evaluation and for training.

    evaluation: source -> whole image -> resized and cropped as `Preprocess` has it -> uint8
    training:   source -> random resized crop -> uint8

Pixels stay uint8 until they are on the device, where `normalize` makes them a model's input.

Shapes: B batch, R resolution.
"""

import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image

from leanclip.errors import SampleError, one_line
from leanclip.preprocess.decoding import MAX_PIXELS, Box, Source, open_image, open_part

log = logging.getLogger("leanclip")

MAX_LENGTH = 1 << 18  # pixels of the long side after the resize
SPARE = 1.5  # scaled decoding keeps at least this many times the wanted side

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


FILTERS = {  # of Pillow, antialiased except for nearest
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
Resize = Literal["shortest", "longest", "squash", "none", "naflex"]
Rounding = Literal["even", "down"]


@dataclass(frozen=True)
class Preprocess:
    """The evaluation transform of a model: `preprocess(image)` -> (3, R, R) float32.

    `evaluation_pixels`, in [0, 1], minus mean, over standard deviation. By default OpenAI's.

    Args:
        resolution: R.
        mean: of red, green and blue in [0, 1].
        std: likewise.
        resize: the side that becomes `size`: shortest, longest, or with squash both; none: an
            image keeps its size; naflex: the size with the most patches, in its proportions.
        size: in pixels, or (height, width) of a squash; None: the resolution.
        interpolation: one of FILTERS.
        rounding: of the crop's offset where the difference of the sides is odd: even: half to
            even, as torchvision, OpenAI and open_clip; down: as transformers.
        fill: the grey level, 0 to 255, around an image that is smaller than the crop.
        patch_size: with naflex, side of a patch in pixels.
        max_patches: with naflex, the most patches of an image.

    Raises:
        ValueError: a value is out of range.
    """

    resolution: int = 224
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resize: Resize = "shortest"
    size: int | tuple[int, int] | None = None
    interpolation: str = "bicubic"
    rounding: Rounding = "even"
    fill: int = 0
    patch_size: int | None = None
    max_patches: int | None = None

    def __post_init__(self) -> None:
        choices = {"resize": get_args(Resize), "rounding": get_args(Rounding)}
        for name, known in (choices | {"interpolation": tuple(FILTERS)}).items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {known}")
        is_pair = isinstance(self.size, tuple)
        if is_pair and (self.resize != "squash" or len(self.sides) != 2):
            raise ValueError(f"size: {self.size} goes with resize squash, as (height, width)")
        if min(self.resolution, *self.sides) < 1 or not 0 <= self.fill <= 255:
            raise ValueError(f"resolution, size or fill: out of range in {self}")

    @property
    def sides(self) -> tuple[int, ...]:
        """Height and width of a squash; else `size` twice."""
        size = self.resolution if self.size is None else self.size
        return size if isinstance(size, tuple) else (size, size)

    def __call__(self, source: Source) -> torch.Tensor:
        """Read, resize, crop and normalise one image.

        Raises:
            SampleError: the image cannot be read.
        """
        pixels = torch.from_numpy(evaluation_pixels(source, self))
        return normalize(pixels[None], self.mean, self.std)[0]

    def at(self, resolution: int) -> "Preprocess":
        """The same view of an image at another resolution."""
        sides = tuple(round(side * resolution / self.resolution) for side in self.sides)
        size = None if self.size is None else sides[0] if isinstance(self.size, int) else sides
        return replace(self, resolution=resolution, size=size)  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocess":
        """From the JSON of `dataclasses.asdict`; missing fields have their defaults.

        Raises:
            KeyError: resolution, mean or std is missing.
            TypeError: a value has another type.
            ValueError: likewise, or it is out of range.
        """
        rest = {name: values[name] for name in _LATER_FIELDS if name in values}
        if isinstance(rest.get("size"), list):
            rest["size"] = tuple(map(int, rest["size"]))
        return cls(
            int(values["resolution"]), rgb_triple(values["mean"]), rgb_triple(values["std"]), **rest
        )


_LATER_FIELDS = ("resize", "size", "interpolation", "rounding", "fill")
_LATER_FIELDS += ("patch_size", "max_patches")


def rgb_triple(values: Any, name: str = "mean or std") -> tuple[float, float, float]:
    """Numbers for red, green and blue from JSON: three, or one for all.

    Raises:
        ValueError: they are anything else.
    """
    try:
        several = [values] * 3 if isinstance(values, int | float) else values
        red, green, blue = (float(value) for value in several)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: {values!r} is not one number, or three") from None
    return red, green, blue


def evaluation_pixels(
    source: Source, preprocess: Preprocess, *, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """The whole image, resized by Pillow and cropped: (3, R, R) uint8.

    Bit-exact with the transform of OpenAI's CLIP for upright 8-bit RGB and greyscale images
    (others become RGB before the resize here, after it there). Therefore no scaled decoding, and
    not torch's resize, which is several times faster and differs by one grey level in 0.1 to
    0.9% of the values.

    Raises:
        SampleError: the image cannot be read, or its sides differ too much.
    """
    return to_array(fit(open_image(source, max_pixels=max_pixels), preprocess))


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
    """A random resized crop, (3, R, R) uint8, by torch's antialiased bicubic.

    Within one grey level of Pillow's crop and resize where it shrinks, two where it enlarges.

    Args:
        source: an image.
        resolution: R.
        rng: draws the crop, on the size of the whole upright image.
        scale: the range of the crop's fraction of the area.
        ratio: the range of its width over its height.
        scaled_decoding: decode a JPEG at 1/2, 1/4 or 1/8 of its size, the smallest that leaves
            the crop 1.5 R pixels a side. Its edges move by half a decoded pixel at most, a third
            of a final one. The mean difference from the full decode of sharp photographs is 0.3
            to 0.8 grey levels at 1/2, 0.3 to 1.3 at 1/4, 0.4 to 2.0 at 1/8, and 1 to 3 where
            edges move.
        max_pixels: an image of more is refused.

    Raises:
        SampleError: the image cannot be read.
    """

    def choose(width: int, height: int) -> tuple[Box, int]:
        box = draw_box(width, height, rng, scale=scale, ratio=ratio)
        return box, decoding_factor(box, resolution) if scaled_decoding else 1

    return resized(open_part(source, choose, max_pixels=max_pixels), resolution)


def resized(part: np.ndarray, resolution: int) -> np.ndarray:
    """(height, width, 3) uint8 -> (3, R, R) uint8 by torch's antialiased bicubic."""
    part = np.ascontiguousarray(part)  # torch has no negative strides, and copies others slowly
    pixels = torch.from_numpy(part).permute(2, 0, 1)[None]  # channels last: vectorised
    pixels = torch.nn.functional.interpolate(
        pixels, size=(resolution, resolution), mode="bicubic", antialias=True
    )
    return np.ascontiguousarray(pixels[0].numpy())


def decoding_factor(box: Box, resolution: int, spare: float = SPARE) -> int:
    """The fraction of its size, 1 / factor, at which a JPEG is decoded for a crop resized to R x R.

    The crop's short side keeps at least `spare` times R pixels.
    """
    left, top, right, bottom = box
    short = min(right - left, bottom - top)
    return next((f for f in (8, 4, 2) if short >= f * spare * resolution), 1)


def fit(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """What a model sees of an RGB image, R x R: resized, then cropped or padded in the middle.

    Raises:
        SampleError: the sides differ so much that the long one would be over MAX_LENGTH, or
            nothing would be left of the short one.
    """
    size = _resized_size(image.size, preprocess)
    if not 0 < min(size) <= max(size) <= MAX_LENGTH:
        width, height = image.size
        reason = f"an image of {width}x{height} pixels is too long for its other side"
        raise SampleError("too long image", reason)
    if preprocess.resize != "none":
        image = image.resize(size, FILTERS[preprocess.interpolation])
    resolution = preprocess.resolution
    left, top = (_offset(side, resolution, preprocess.rounding) for side in size)
    if preprocess.fill and min(size) < resolution:
        canvas = Image.new("RGB", (resolution, resolution), (preprocess.fill,) * 3)
        canvas.paste(image, (-left, -top))
        return canvas
    return image.crop((left, top, left + resolution, top + resolution))  # black outside of it


def _resized_size(size: tuple[int, int], preprocess: Preprocess) -> tuple[int, int]:
    """Width and height after the resize."""
    width, height = size
    to_height, to_width = preprocess.sides
    match preprocess.resize:
        case "squash":
            return to_width, to_height
        case "shortest":  # rounded down, as torchvision and transformers
            short = min(size)
            return to_width * width // short, to_width * height // short
        case "longest":  # rounded to even, as open_clip
            ratio = max(width / to_width, height / to_width)
            return round(width / ratio), round(height / ratio)
        case "none":
            return size


def _offset(side: int, crop: int, rounding: Rounding) -> int:
    """Where a crop begins in a side; negative: so many pixels are put before it."""
    if rounding == "down":
        return (side - crop) // 2
    return round((side - crop) / 2) if side >= crop else -((crop - side) // 2)


def view(image: Image.Image, preprocess: Preprocess, side: int) -> Image.Image:
    """The part of an RGB image that a model sees, at another resolution for display."""
    if preprocess.resize == "none":
        return fit(image, preprocess).resize((side, side), FILTERS["bicubic"])
    return fit(image, preprocess.at(side))


def center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """As `fit`, by OpenAI's transform: short side to R, then the square in the middle."""
    return fit(image, Preprocess(resolution))


def image_or_none(source: Source) -> Image.Image | None:
    """The image for a figure or a page; None, with a warning, where it cannot be read."""
    if source == b"":  # was not readable before, and logged
        return None
    try:
        return open_image(source)
    except (SampleError, OSError, MemoryError) as error:
        warn_unreadable_once(one_line(error))
        return None


@lru_cache(1000)
def warn_unreadable_once(reason: str) -> None:
    """Log once why an image is missing in figures."""
    log.warning("not shown: %s", reason)


def center_square(image: Image.Image) -> Box:
    """The box of the largest centred square."""
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


def encode_jpeg(image: Image.Image, quality: int = 88) -> bytes:
    """An RGB image as a JPEG without metadata."""
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
