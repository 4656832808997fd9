"""OpenAI's image transform in steps, with torchvision's names and results.

    PIL image -> Resize -> CenterCrop -> _convert_image_to_rgb -> ToTensor -> Normalize

As there, an image is converted to RGB after it is resized, by Pillow's `convert`: alpha is dropped,
a palette is resized without interpolation, 16-bit greyscale is clipped at 255, and EXIF orientation
is ignored. `leanclip.Preprocess` handles these cases, so its pixels differ for such images.

Resize, CenterCrop and Normalize also take tensors (..., H, W), as torchvision's do, with gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from leanclip.preprocess.images import CLIP_MEAN, CLIP_STD, FILTERS, Preprocess, Rounding

__all__ = ["BICUBIC", "CenterCrop", "Compose", "Normalize", "Resize", "ToTensor"]
BICUBIC = Image.Resampling.BICUBIC
_TENSOR_MODES = {Image.Resampling.BILINEAR: "bilinear", BICUBIC: "bicubic"}


@dataclass
class Compose:
    """The steps in `transforms`, one after another."""

    transforms: list[Any]  # callables

    def __call__(self, image: Any) -> Any:
        """The result of the last step."""
        for transform in self.transforms:
            image = transform(image)
        return image


@dataclass
class Resize:
    """The short side to `size`, or both to (height, width), antialiased.

    Args:
        size: in pixels.
        interpolation: one of Pillow's, or its name in lower case.
    """

    size: int | Sequence[int]
    interpolation: Image.Resampling | int | str = Image.Resampling.BILINEAR

    def __post_init__(self) -> None:
        if isinstance(self.interpolation, str):
            self.interpolation = Image.Resampling[self.interpolation.upper()]
        self.interpolation = Image.Resampling(self.interpolation)

    def __call__(self, image: Any) -> Any:
        """A PIL image or a tensor (..., H, W), resized."""
        width, height = _size_of(image)
        if isinstance(self.size, int):
            short = min(width, height)
            new = (self.size * height // short, self.size * width // short)
        else:
            new = (self.size[0], self.size[-1])
        if not isinstance(image, torch.Tensor):
            return image.resize(new[::-1], self.interpolation)
        if new == (height, width):
            return image
        mode = _TENSOR_MODES[Image.Resampling(self.interpolation)]
        x = image.reshape(-1, *image.shape[-3:])
        x = F.interpolate(x, new, mode=mode, antialias=True)
        return x.reshape(*image.shape[:-2], *new)


@dataclass
class CenterCrop:
    """The centre of an image, `size` or (height, width), padded with black.

    Args:
        size: in pixels.
        rounding: of half a pixel: "even" as in torchvision, "down" as in transformers.
    """

    size: int | Sequence[int]
    rounding: Rounding = "even"

    def __post_init__(self) -> None:
        self.size = (self.size,) * 2 if isinstance(self.size, int) else tuple(self.size)

    def __call__(self, image: Any) -> Any:
        """A PIL image or a tensor (..., H, W), cropped."""
        assert not isinstance(self.size, int)
        (width, height), (rows, columns) = _size_of(image), self.size
        if self.rounding == "down":
            left, top = (width - columns) // 2, (height - rows) // 2
        else:
            left, top = round((width - columns) / 2), round((height - rows) / 2)
        right, bottom = left + columns, top + rows
        if isinstance(image, torch.Tensor):
            return F.pad(image, (-left, right - width, -top, bottom - height))
        return image.crop((left, top, right, bottom))


class ToTensor:
    """A PIL image or an array (H, W, C) -> (C, H, W); bytes become float32 in [0, 1]."""

    def __call__(self, image: Image.Image | np.ndarray) -> torch.Tensor:
        """The tensor of one image."""
        pixels = np.array(image)
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        x = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        if x.dtype == torch.bool:
            return x.float()
        return x.float() / 255 if x.dtype == torch.uint8 else x

    def __repr__(self) -> str:
        return "ToTensor()"


@dataclass
class Normalize:
    """(x - mean) / std of each channel of a tensor (..., C, H, W)."""

    mean: Sequence[float]
    std: Sequence[float]
    inplace: bool = False

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The normalised tensor."""
        mean, std = (tensor.new_tensor(list(v)).view(-1, 1, 1) for v in (self.mean, self.std))
        return (tensor if self.inplace else tensor.clone()).sub_(mean).div_(std)


def _convert_image_to_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def _transform(
    n_px: int,
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
) -> Compose:
    """OpenAI's transform for images of `n_px` pixels a side."""
    return Compose(
        [
            Resize(n_px, interpolation=BICUBIC),
            CenterCrop(n_px),
            _convert_image_to_rgb,
            ToTensor(),
            Normalize(mean, std),
        ]
    )


def steps_of(preprocess: Preprocess) -> Compose:
    """A model's preprocessing in OpenAI's steps; as one step where they cannot express it."""
    if preprocess.resize not in ("shortest", "squash") or preprocess.fill:
        return Compose([preprocess])
    steps = _transform(preprocess.resolution, preprocess.mean, preprocess.std)
    size = preprocess.sides if preprocess.resize == "squash" else preprocess.sides[0]
    steps.transforms[:2] = [
        Resize(size, FILTERS[preprocess.interpolation]),
        CenterCrop(preprocess.resolution, preprocess.rounding),
    ]
    return steps


def _size_of(image: Any) -> tuple[int, int]:
    """Width and height."""
    if isinstance(image, torch.Tensor):
        return image.shape[-1], image.shape[-2]
    return image.size
