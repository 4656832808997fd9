"""Decode a path, bytes or a PIL image into upright RGB, or raise a one-line SampleError.

    open_image: source -> header: format, size -> limit on pixels -> Pillow -> the whole image
    open_part:                                                    -> simplejpeg -> a part of it

Pillow and simplejpeg decode JPEG with libjpeg-turbo into the same pixels; simplejpeg writes an
array and can decode at 1/2, 1/4 or 1/8 of the size. Pillow decodes all that simplejpeg refuses
(other formats, CMYK, damaged files). The result of unusual images:

    EXIF or XMP orientation    transposed as by PIL.ImageOps.exif_transpose
    transparency               composited on white
    16-bit greyscale           divided by 257, rounded
    32-bit integers, floats    stretched: the smallest finite value is black, the largest white
    animations                 the first frame
"""

import errno
import io
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from leanclip.errors import SampleError, is_shortage
from leanclip.io.files import LFS_POINTER, URL_IN_DATA, is_lfs_pointer, is_url
from leanclip.preprocess.image_formats import FORMATS, RAW_SUFFIXES, other_format

Source = str | Path | bytes | Image.Image
File = BinaryIO | Image.Image  # a PIL image is its own file
Box = tuple[int, int, int, int]  # left, top, right, bottom

MAX_PIXELS = 178_956_970  # where Pillow raises DecompressionBombError
MAX_SCANS = 100  # of a JPEG, each over all pixels; progressive ones have about ten
_BAND = 1 << 22  # pixels converted at once
_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")  # of a JPEG, except those without a length

# EXIF orientations: flip the stored image, then swap its axes.
_FLIPPED_X = (2, 3, 7, 8)
_FLIPPED_Y = (3, 4, 6, 7)
_SWAPPED = (5, 6, 7, 8)


def open_image(source: Source, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The whole image, upright and in RGB.

    Raises:
        SampleError: the file is missing, no image, damaged, or over `max_pixels` by its header.
    """
    with _opened(source, max_pixels) as (image, _):
        return _upright_rgb(image)


def open_part(
    source: Source,
    choose: Callable[[int, int], tuple[Box, int]],
    *,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """A part of the upright image, (height, width, 3) uint8; possibly a view of a larger array.

    Args:
        source: as of `open_image`.
        choose: takes the width and height of the upright image and returns a box and 1, 2, 4 or
            8: a JPEG is decoded at this fraction of its size, and the part is as much smaller.
            The box's edges move to multiples of that number, by half of it at most.
        max_pixels: as of `open_image`.

    Raises:
        SampleError: as `open_image`.
    """
    with _opened(source, max_pixels) as (image, file):
        if isinstance(file, Image.Image) or not _is_plain_jpeg(image):
            image = _upright_rgb(image)
            return np.array(image.crop(choose(*image.size)[0]))
        orientation = exif_orientation(image)
        width, height = image.size
        box, factor = choose(*((height, width) if orientation in _SWAPPED else (width, height)))
        pixels = _decode_jpeg(file, image.size, factor)
        if pixels is None:
            return np.array(_upright_rgb(image).crop(box))
        left, top, right, bottom = _shrunk(_stored(box, image.size, orientation), factor)
        return _turned(pixels[top:bottom, left:right], orientation)


@contextmanager
def _opened(source: Source, max_pixels: int) -> Iterator[tuple[Image.Image, File]]:
    """The image with only its header read, and its file; errors within become SampleErrors."""
    name = source if isinstance(source, str | Path) else f"<{type(source).__name__}>"
    with image_errors(f"{name}: "), _file(source) as file:
        yield read_header(file, max_pixels), file


@contextmanager
def image_errors(name: str = "") -> Iterator[None]:
    """Turn the errors of reading an image into a SampleError that begins with `name`."""
    try:
        yield
    except SampleError as error:
        raise SampleError(error.kind, f"{name}{error}") from None
    except FileNotFoundError as error:
        if is_url(str(error.filename).replace(":/", "://", 1)):  # a Path has one slash of the two
            raise SampleError("image at a URL", f"{name}{URL_IN_DATA}") from None
        raise SampleError("missing file", f"{name}no such image") from None
    except Exception as error:  # decoders raise many kinds on damaged files
        if is_shortage(error):
            raise
        kind, reason = _fault(error)
        raise SampleError(kind, f"{name}cannot be read as an image: {reason}") from None


def read_header(file: File, max_pixels: int) -> Image.Image:
    """The image, its pixels not yet decoded; to be called within `image_errors`.

    Raises:
        SampleError: the file is empty, in another format, or over `max_pixels`.
        Exception: another one that `image_errors` turns into a SampleError.
    """
    if isinstance(file, Image.Image):
        image = file
    elif file.read(1):
        try:
            image = Image.open(file, formats=FORMATS)  # seeks to the start
        except UnidentifiedImageError:
            raise _unidentified(file) from None
    else:
        raise SampleError("empty file", "cannot be read as an image: it is empty")
    if not image.width * image.height:
        raise ValueError("it has no pixels")
    if image.width * image.height > max_pixels:
        size = f"{image.width}x{image.height}"
        raise SampleError("too many pixels", f"{size} pixels are over the limit of {max_pixels}")
    if not isinstance(file, Image.Image) and _may_have_many_scans(image, file):
        file.seek(0)
        check_scans(file.read())
    return image


def _unidentified(file: BinaryIO) -> SampleError:
    """The error for a file that no decoder accepts."""
    file.seek(0)
    head = file.read(1024)
    if is_lfs_pointer(head):
        return SampleError("git-lfs pointer", LFS_POINTER)
    reason = f"cannot be read as an image: it is none of {', '.join(FORMATS)}"
    if (found := other_format(head)) is not None:
        reason += f" but {found}; convert it to JPEG or PNG"
        return SampleError("unsupported format", reason)
    return SampleError("not an image", reason)


def is_image(content: bytes) -> bool:
    """Whether content begins like an image, in a format that is read or another."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS):
            return True
    except Exception:  # decoders raise many kinds
        return other_format(content) is not None


def _may_have_many_scans(image: Image.Image, file: BinaryIO) -> bool:
    """Whether this is a JPEG of more than one scan."""
    if image.format != "JPEG" or "progressive" in image.info:
        return image.format in ("JPEG", "MPO")
    # The file is at the first scan: its length (two bytes), its number of components.
    return file.read(3)[2:] != bytes([getattr(image, "layers", 0)])


def check_scans(data: bytes) -> None:
    """Refuse a JPEG of so many scans that a megabyte takes minutes to decode.

    Raises:
        ValueError: it has over MAX_SCANS.
    """
    if data.count(b"\xff\xda") <= MAX_SCANS:  # an upper bound
        return
    scans, at = 0, 2
    while (found := _MARKER.search(data, at)) and found[0] != b"\xff\xd9":  # the image's end
        scans += found[0] == b"\xff\xda"
        if scans > MAX_SCANS:
            raise ValueError(f"it has over {MAX_SCANS} scans")
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")


def open_regular_file(path: str | Path) -> BinaryIO:
    """Open a regular file for reading; reading a pipe would block, a device might not end.

    Raises:
        OSError: it cannot be opened, or is no regular file.
        SampleError: it has the suffix of a camera's raw format.
    """
    if (suffix := Path(path).suffix.lower()) in RAW_SUFFIXES:
        raise SampleError(
            "unsupported format",
            f"cannot be read as an image: {suffix} is a raw format; convert it to JPEG or PNG",
        )
    # O_NONBLOCK: opening a pipe does not wait for its other end.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "Is not a regular file")
    return file


def _file(source: Source) -> AbstractContextManager[File]:
    if isinstance(source, Image.Image):
        return nullcontext(source)
    return io.BytesIO(source) if isinstance(source, bytes) else open_regular_file(source)


def _fault(error: Exception) -> tuple[str, str]:
    """The kind of an error and its reason."""
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels", str(error)
    if isinstance(error, OSError) and error.errno is not None:  # Pillow's own have no number
        return "unreadable file", str(error.strerror)
    return "damaged image", str(error) or type(error).__name__


def exif_orientation(image: Image.Image) -> int:
    """EXIF's (or XMP's) orientation, 1 to 8; 1 where there is none or it is damaged."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises many kinds on damaged blocks; the pixels are still good
        return 1
    return int(orientation) if orientation in range(1, 9) else 1


def _is_plain_jpeg(image: Image.Image) -> bool:
    return image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")


def _decode_jpeg(file: BinaryIO, size: tuple[int, int], factor: int) -> np.ndarray | None:
    """(height, width, 3) uint8 at 1/`factor` of the size; None: leave it to Pillow."""
    file.seek(0)
    data = file.read()
    try:
        if simplejpeg.decode_jpeg_header(data)[1::-1] != size:  # Pillow checked the size
            return None
        width, height = (-(-side // factor) for side in size)
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_width=width, min_height=height)
    except ValueError:
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def _stored(box: Box, size: tuple[int, int], orientation: int) -> Box:
    """A box of the upright image in coordinates of the stored one of this size."""
    left, top, right, bottom = box
    if orientation in _SWAPPED:
        left, top, right, bottom = top, left, bottom, right
    if orientation in _FLIPPED_X:
        left, right = size[0] - right, size[0] - left
    if orientation in _FLIPPED_Y:
        top, bottom = size[1] - bottom, size[1] - top
    return left, top, right, bottom


def _shrunk(box: Box, factor: int) -> Box:
    left, top, right, bottom = ((edge + factor // 2) // factor for edge in box)
    return left, top, right, bottom


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """An upright view of stored pixels (H, W, 3)."""
    if orientation in _FLIPPED_X:
        pixels = pixels[:, ::-1]
    if orientation in _FLIPPED_Y:
        pixels = pixels[::-1]
    if orientation in _SWAPPED:
        pixels = pixels.transpose(1, 0, 2)
    return pixels


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()  # for a TIFF this applies and removes the orientation
    orientation = exif_orientation(image)
    image = _rgb(image)
    return image if orientation == 1 else Image.fromarray(_turned(np.asarray(image), orientation))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return _in_bands(image, _from_16_bits)
    if image.mode in ("I", "F"):
        low, high = _range_of(image)
        return _in_bands(image, lambda band: _stretched(band, low, high))
    if image.has_transparency_data:
        return _in_bands(image, _on_white)
    return image if image.mode == "RGB" else image.convert("RGB")


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Bands of rows and the number of their first row: conversions copy one band at a time."""
    rows = max(1, _BAND // image.width)
    if rows >= image.height:
        yield 0, image
        return
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _in_bands(image: Image.Image, to_rgb: Callable[[Image.Image], Image.Image]) -> Image.Image:
    result = Image.new("RGB", image.size)
    for top, band in _bands(image):
        result.paste(to_rgb(band), (0, top))
    return result


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """16-bit greyscale -> RGB; convert() would clip at 255."""
    values = np.asarray(image).astype(np.uint32)
    grey = ((values + 128) // 257).astype(np.uint8)
    if "transparency" in image.info:  # of PNG: one transparent value
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")


def _range_of(image: Image.Image) -> tuple[float, float]:
    """The smallest and the largest finite value."""
    low, high = np.inf, -np.inf
    for _, band in _bands(image):
        values = np.asarray(band).astype(np.float64)
        finite = values[np.isfinite(values)]
        if finite.size:
            low, high = min(low, finite.min()), max(high, finite.max())
    return (float(low), float(high)) if low <= high else (0.0, 0.0)


def _stretched(image: Image.Image, low: float, high: float) -> Image.Image:
    """Values in [low, high] -> RGB."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64), nan=low, posinf=high, neginf=low)
    grey = np.round((values - low) * (255 / (high - low) if high > low else 0))
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
