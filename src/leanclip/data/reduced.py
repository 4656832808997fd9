"""Images read whole but decoded small, for what only needs them small: packing, checking."""

import io
import warnings

from PIL import ExifTags, Image, UnidentifiedImageError

from leanclip.data.samples import Sample
from leanclip.decoding import check_scans, open_regular
from leanclip.errors import SampleError
from leanclip.images import FORMATS, open_image

MARGIN = 2  # a decoder's own reduction keeps this many times the wanted side; benchmarks/pack.py


def image_bytes(sample: Sample) -> bytes:
    """The file of a sample's image.

    Raises:
        SampleError: it is missing or cannot be read.
    """
    if isinstance(sample.image, bytes):
        return sample.image
    try:
        with open_regular(sample.image) as file:
            return file.read()
    except (FileNotFoundError, ValueError):  # or no name that a file can have
        raise SampleError("missing file", f"{sample.image}: no such image") from None
    except OSError as error:
        raise SampleError(
            "unreadable file", f"{sample.image}: cannot be read: {error.strerror}"
        ) from None


def open_header(data: bytes, *, max_pixels: int) -> Image.Image:
    """The image with its header read and its pixels not yet decoded.

    Raises:
        SampleError: it is no image, or over `max_pixels`.
    """
    if not data:
        raise SampleError("empty file", "cannot be read as an image: it is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of bombs; max_pixels refuses them
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.format in ("JPEG", "MPO"):
            check_scans(data)
    except UnidentifiedImageError:  # its own message names an address in memory
        reason = f"cannot be read as an image: it is none of {', '.join(FORMATS)}"
        raise SampleError("not an image", reason) from None
    except Image.DecompressionBombError as error:
        raise SampleError("too many pixels", str(error)) from None
    except Exception as error:  # decoders raise many kinds on damaged files
        raise SampleError("damaged image", f"cannot be read as an image: {error}") from None
    if image.width * image.height > max_pixels:
        size = f"{image.width}x{image.height}"
        raise SampleError("too many pixels", f"{size} pixels are over the limit of {max_pixels}")
    return image


def open_reduced(image: Image.Image, side: int, *, max_pixels: int) -> Image.Image:
    """An image of which the header is read -> RGB, its short side at least MARGIN x `side`.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves enough; others, and smaller
    ones, come as they are. Every byte is read all the same: damage is found.

    Raises:
        SampleError: it is damaged.
    """
    short = min(image.size)
    factor = next((f for f in (8, 4, 2) if short >= f * MARGIN * side), 1)
    if factor > 1:
        image.draft(None, (image.width // factor, image.height // factor))
    return open_image(image, max_pixels=max_pixels)


def is_turned(image: Image.Image) -> bool:
    """Whether an image of which the header is read says that it lies on a side, or is mirrored."""
    if image.format == "PNG" and "exif" not in image.info:
        return False  # Pillow would decode it to look for more behind the pixels
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except Exception:  # Pillow raises many kinds on broken blocks; the pixels may still be good
        return False
