"""Scaled decoding of whole images, for packing and checking."""

import io

from PIL import Image

from leanclip.data.dataset import Sample
from leanclip.preprocess.crops import decoding_factor
from leanclip.preprocess.decoding import (
    exif_orientation,
    image_errors,
    open_image,
    open_regular_file,
    read_header,
)

MARGIN = 2  # scaled decoding keeps at least this many times the wanted side; benchmarks/pack.py


def image_bytes(sample: Sample) -> bytes:
    """The file of a sample's image.

    Raises:
        SampleError: it is missing or cannot be read.
    """
    if isinstance(sample.image, bytes):
        return sample.image
    with image_errors(f"{sample.image}: "), open_regular_file(sample.image) as file:
        return file.read()


def open_header(data: bytes, *, max_pixels: int) -> Image.Image:
    """The image, its pixels not yet decoded.

    Raises:
        SampleError: it is no image, or over `max_pixels`.
    """
    with image_errors():
        return read_header(io.BytesIO(data), max_pixels)


def open_scaled(image: Image.Image, side: int, *, max_pixels: int) -> Image.Image:
    """Decode the result of `open_header` into RGB, at a smaller size if it is a large JPEG.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if its short side is still MARGIN x `side`.
    Every byte is read, so that damage is found.

    Raises:
        SampleError: it is damaged.
    """
    factor = decoding_factor((0, 0, *image.size), side, MARGIN)
    if factor > 1:
        image.draft(None, (image.width // factor, image.height // factor))
    return open_image(image, max_pixels=max_pixels)


def is_rotated(image: Image.Image) -> bool:
    """Whether the header of an image has an orientation other than upright."""
    if image.format == "PNG" and "exif" not in image.info:
        return False  # Pillow would decode the pixels to look for EXIF behind them
    return exif_orientation(image) != 1
