"""Images: bytes, a path or a PIL image -> (3, R, R) uint8, as `Preprocess` describes it.

    source -> whole image -> resized and cropped -> uint8 -> a batch -> normalised

Pixels stay uint8 until they are on the device, where `normalize` makes them a model's input.
With `resize="naflex"` an image is (3, ph, pw), in its own proportions; `Preprocess.stack` makes
`Patches` of several.

Shapes: B batch, R resolution, h rows and w columns of patches of p pixels a side.
"""

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from PIL import Image

from leanclip.errors import SampleError, one_line
from leanclip.preprocess.decoding import MAX_PIXELS, Box, Source, open_image
from leanclip.preprocess.patches import Patches, patched_size, stack_patches

log = logging.getLogger("leanclip")

MAX_LENGTH = 1 << 18  # pixels of the long side after the resize

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
    """The evaluation transform of a model: `preprocess(image)` -> (3, R, R) float32, or Patches.

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
        for name in ("patch_size", "max_patches"):
            value = getattr(self, name)
            if (value is not None) != self.is_naflex:
                raise ValueError(f"{name}: {value} goes with resize naflex, and only with it")
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name}: {value} is not a whole positive number")

    @property
    def is_naflex(self) -> bool:
        """Whether images keep their proportions, and a model takes them as patches."""
        return self.resize == "naflex"

    @property
    def sides(self) -> tuple[int, ...]:
        """Height and width of a squash; else `size` twice."""
        size = self.resolution if self.size is None else self.size
        return size if isinstance(size, tuple) else (size, size)

    def __call__(self, source: Source) -> torch.Tensor | Any:
        """Read, resize, crop and normalise one image: (3, R, R); with naflex, Patches of one image.

        Raises:
            SampleError: the image cannot be read.
        """
        pixels = normalize(self.stack([evaluation_pixels(source, self)]), self.mean, self.std)
        return pixels if isinstance(pixels, Patches) else pixels[0]

    def stack(self, images: Sequence[np.ndarray]) -> torch.Tensor | Any:
        """A batch of `evaluation_pixels`: (B, 3, R, R) uint8; with naflex, padded Patches."""
        if self.patch_size is None or self.max_patches is None:
            return torch.from_numpy(np.stack(images))
        return stack_patches(images, self.patch_size, self.max_patches)

    def shape_of_image(self, patches: int | None = None) -> tuple[int, ...]:
        """That of an image in a batch: (3, R, R); with naflex, (`patches`, 3p²)."""
        if self.patch_size is None or self.max_patches is None:
            return 3, self.resolution, self.resolution
        return patches or self.max_patches, 3 * self.patch_size**2

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
    """The whole image, resized by Pillow and cropped: (3, R, R), or (3, ph, pw) uint8.

    Bit-exact with the transform of OpenAI's CLIP for upright 8-bit RGB and greyscale images
    (others become RGB before the resize here, after it there). Therefore no scaled decoding, and
    not torch's resize, which is several times faster and differs by one grey level in 0.1 to
    0.9% of the values.

    Raises:
        SampleError: the image cannot be read, or its sides differ too much.
    """
    return to_array(fit(open_image(source, max_pixels=max_pixels), preprocess))


def fit(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """What a model sees of an RGB image, R x R: resized, then cropped or padded in the middle.

    With naflex, the whole image.

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
    if preprocess.is_naflex:
        return image
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
        case "naflex":
            assert preprocess.patch_size is not None
            assert preprocess.max_patches is not None
            most = preprocess.patch_size, preprocess.max_patches
            to_height, to_width = patched_size(height, width, *most)
            return to_width, to_height
        case "none":
            return size


def _offset(side: int, crop: int, rounding: Rounding) -> int:
    """Where a crop begins in a side; negative: so many pixels are put before it."""
    if rounding == "down":
        return (side - crop) // 2
    return round((side - crop) / 2) if side >= crop else -((crop - side) // 2)


def view(image: Image.Image, preprocess: Preprocess, side: int) -> Image.Image:
    """The part of an RGB image that a model sees, at another resolution for display.

    With naflex, the whole image, with a long side of `side`.
    """
    if preprocess.is_naflex:
        scale = side / max(image.size)
        width, height = (max(1, round(n * scale)) for n in image.size)
        return image.resize((width, height), FILTERS["bicubic"])
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


def encode_jpeg(image: Image.Image, quality: int = 88) -> bytes:
    """An RGB image as a JPEG without metadata."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def to_array(image: Image.Image) -> np.ndarray:
    """An RGB image -> (3, height, width) uint8."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


Pixels = TypeVar("Pixels", torch.Tensor, Patches, torch.Tensor | Patches)


def normalize(
    pixels: Pixels, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Pixels:
    """uint8 pixels (B, 3, R, R) -> (pixels / 255 - mean) / std, float32, on their device.

    The padding of patches is 0, as transformers'.
    """
    if isinstance(pixels, Patches):
        values = pixels.values.float().div_(255).unflatten(2, (-1, 3))  # (B, P, p², 3)
        mean_, std_ = values.new_tensor(mean), values.new_tensor(std)
        values = values.sub_(mean_).div_(std_).mul_(pixels.mask[..., None, None])
        return replace(pixels, values=values.flatten(2))
    pixels = pixels.float().div_(255)
    mean_, std_ = (pixels.new_tensor(v).view(3, 1, 1) for v in (mean, std))
    return pixels.sub_(mean_).div_(std_)
