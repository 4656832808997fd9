"""Images read whole but decoded small, for what only needs them small: packing, checking."""

import io

from PIL import Image

from leanclip.data.dataset import Sample
from leanclip.preprocess.decoding import open_regular, orientation_of, read_header, refusing
from leanclip.preprocess.images import decoding_factor, open_image

MARGIN = 2  # a decoder's own reduction keeps this many times the wanted side; benchmarks/pack.py


def image_bytes(sample: Sample) -> bytes:
    """The file of a sample's image.

    Raises:
        SampleError: it is missing or cannot be read.
    """
    if isinstance(sample.image, bytes):
        return sample.image
    with refusing(f"{sample.image}: "), open_regular(sample.image) as file:
        return file.read()


def open_header(data: bytes, *, max_pixels: int) -> Image.Image:
    """The image with its header read and its pixels not yet decoded.

    Raises:
        SampleError: it is no image, or over `max_pixels`.
    """
    with refusing():
        return read_header(io.BytesIO(data), max_pixels)


def open_reduced(image: Image.Image, side: int, *, max_pixels: int) -> Image.Image:
    """An image of which the header is read -> RGB, its short side at least MARGIN x `side`.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves enough; others, and smaller
    ones, come as they are. Every byte is read all the same: damage is found.

    Raises:
        SampleError: it is damaged.
    """
    factor = decoding_factor((0, 0, *image.size), side, MARGIN)
    if factor > 1:
        image.draft(None, (image.width // factor, image.height // factor))
    return open_image(image, max_pixels=max_pixels)


def is_turned(image: Image.Image) -> bool:
    """Whether an image of which the header is read says that it lies on a side, or is mirrored."""
    if image.format == "PNG" and "exif" not in image.info:
        return False  # Pillow would decode it to look for more behind the pixels
    return orientation_of(image) != 1
