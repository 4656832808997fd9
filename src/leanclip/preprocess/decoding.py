"""A path, bytes or a PIL image -> upright RGB pixels, or one line on why there are none.

    open_image: source -> header: format, size -> limit on pixels -> Pillow -> the whole image
    open_part:                                                    -> simplejpeg -> a part of it

Pillow and simplejpeg both decode JPEG with libjpeg-turbo and give the same pixels; simplejpeg's
are an array at once, and can be had at 1/2, 1/4 or 1/8 of the size for less. What it does not
take (other formats, CMYK, damage of any kind) is Pillow's to decide. What an image becomes:

    EXIF or XMP orientation    turned, as PIL.ImageOps.exif_transpose turns it
    transparent parts          composited on white
    16-bit greyscale           divided by 257, rounded
    32-bit integers, floats    stretched: the least finite value is black, the greatest white
    animations                 their first frame
"""

import errno
import io
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from leanclip.errors import SampleError, is_shortage
from leanclip.io.files import LFS_POINTER, URL_IN_DATA, is_lfs_pointer, is_url
from leanclip.preprocess.image_formats import FORMATS, RAW_SUFFIXES, other_format

Source = str | Path | bytes | Image.Image
File = BinaryIO | Image.Image  # an image that is opened already stands for its file
Box = tuple[int, int, int, int]  # left, top, right, bottom

MAX_PIXELS = 178_956_970  # Pillow's own bound for "decompression bomb" errors
MAX_SCANS = 100  # of a JPEG: each goes over all pixels; progressive ones have about ten
_BAND = 1 << 22  # pixels that are converted at once
_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")  # of a JPEG, but those without a length

# EXIF's orientations: flip the stored image, then swap its axes where that is needed.
MIRRORED = (2, 3, 7, 8)  # left for right
UPSIDE_DOWN = (3, 4, 6, 7)
SWAPPED = (5, 6, 7, 8)


def open_image(source: Source, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The whole image, upright and in RGB; the head of this file says what becomes of what.

    Raises:
        SampleError: there is no such file, it is no image, it is damaged, or its header
            declares more than `max_pixels` pixels.
    """
    with _opened(source, max_pixels) as (image, _):
        return _upright_rgb(image)


def open_small(source: Source, most: int, *, max_pixels: int = MAX_PIXELS) -> np.ndarray | None:
    """As `open_image`, (height, width, 3); None of one with more than `most` pixels, and of a JPEG.

    Of a JPEG `open_part` may decode less than the whole.
    """
    with _opened(source, max_pixels) as (image, _):
        if image.format in ("JPEG", "MPO") or image.width * image.height > most:
            return None
        return np.array(_upright_rgb(image))


def open_part(
    source: Source | np.ndarray,
    choose: Callable[[int, int], tuple[Box, int]],
    *,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """A part of the upright image, (height, width, 3) uint8; it may be a view of a larger array.

    `choose` is given the width and height of the upright image and answers with a box and
    with 1, 2, 4 or 8: by how much a JPEG may be decoded smaller, which then gives that part
    smaller. The box's edges move to multiples of that number, by half of it at most.

    An array is what `open_small` gave.

    Raises:
        SampleError: as `open_image`.
    """
    if isinstance(source, np.ndarray):
        height, width, _ = source.shape
        left, top, right, bottom = choose(width, height)[0]
        return source[top:bottom, left:right]
    with _opened(source, max_pixels) as (image, file):
        if isinstance(file, Image.Image) or not _is_plain_jpeg(image):
            image = _upright_rgb(image)
            return np.array(image.crop(choose(*image.size)[0]))
        orientation = orientation_of(image)
        width, height = image.size
        box, factor = choose(*((height, width) if orientation in SWAPPED else (width, height)))
        pixels = _decode_jpeg(file, image.size, factor)
        if pixels is None:
            return np.array(_upright_rgb(image).crop(box))
        left, top, right, bottom = _shrunk(_stored(box, image.size, orientation), factor)
        return _turned(pixels[top:bottom, left:right], orientation)


@contextmanager
def _opened(source: Source, max_pixels: int) -> Iterator[tuple[Image.Image, File]]:
    """The image with only its header read, and its file; what fails within is a SampleError."""
    name = source if isinstance(source, str | Path) else f"<{type(source).__name__}>"
    with refusing(f"{name}: "), _file(source) as file:
        yield read_header(file, max_pixels), file


@contextmanager
def refusing(name: str = "") -> Iterator[None]:
    """Turn what goes wrong with an image into a SampleError that begins with `name`."""
    try:
        with _quiet:  # Pillow warns of bombs; max_pixels refuses them
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
    """The image, its pixels not yet decoded; within `refusing`.

    Raises:
        SampleError: the file is empty, or its header declares more than `max_pixels` pixels.
        Exception: one of those that `refusing` makes a SampleError.
    """
    if isinstance(file, Image.Image):
        image = file
    elif file.read(1):
        try:
            image = Image.open(file, formats=FORMATS)  # from the start of the file
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
    """What is to be said of a file that no decoder takes."""
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
    """Whether content begins as an image does, in any format that is known here."""
    try:
        with _quiet, Image.open(io.BytesIO(content), formats=FORMATS):
            return True
    except Exception:  # decoders raise many kinds
        return other_format(content) is not None


def _may_have_many_scans(image: Image.Image, file: BinaryIO) -> bool:
    """Whether more than a JPEG's first scan will be decoded."""
    if image.format != "JPEG" or "progressive" in image.info:
        return image.format in ("JPEG", "MPO")
    # The header has been read up to the scan's length (two bytes) and its number of components.
    return file.read(3)[2:] != bytes([getattr(image, "layers", 0)])


def check_scans(data: bytes) -> None:
    """Refuse a JPEG of so many scans that a megabyte of them would be decoded for minutes.

    Raises:
        ValueError: it has over MAX_SCANS.
    """
    if data.count(b"\xff\xda") <= MAX_SCANS:  # as many as there can be
        return
    scans, at = 0, 2
    while (found := _MARKER.search(data, at)) and found[0] != b"\xff\xd9":  # the image's end
        scans += found[0] == b"\xff\xda"
        if scans > MAX_SCANS:
            raise ValueError(f"it has over {MAX_SCANS} scans")
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")


class _Quiet:
    """Silences warnings while any thread is within.

    `warnings.catch_warnings` of two threads that overlap would leave them silenced for good.
    """

    def __init__(self) -> None:
        self.lock, self.within, self.saved = Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            self.within += 1
            if self.within == 1:
                self.saved.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.within -= 1
            if self.within == 0:
                self.saved.close()


_quiet = _Quiet()


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading, and nothing else: a pipe would be waited for, a device not end.

    Raises:
        OSError: it cannot be opened, or is no regular file.
        SampleError: by its name it is of a camera's own format.
    """
    if (suffix := Path(path).suffix.lower()) in RAW_SUFFIXES:
        raise SampleError(
            "unsupported format",
            f"cannot be read as an image: {suffix} is a camera's own format; convert it to JPEG "
            f"or PNG",
        )
    # Without waiting for a pipe's other end.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "Is not a regular file")
    return file


def _file(source: Source) -> AbstractContextManager[File]:
    if isinstance(source, Image.Image):
        return nullcontext(source)
    return io.BytesIO(source) if isinstance(source, bytes) else open_regular(source)


def _fault(error: Exception) -> tuple[str, str]:
    """The kind of an error and what to say of it."""
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels", str(error)
    if isinstance(error, OSError) and error.errno is not None:  # Pillow's own have no number
        return "unreadable file", str(error.strerror)
    return "damaged image", str(error) or type(error).__name__


def orientation_of(image: Image.Image) -> int:
    """EXIF's (or XMP's) 1 to 8; 1 where there is none or it is broken."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises many kinds on broken blocks; the pixels are still good
        return 1
    return int(orientation) if orientation in range(1, 9) else 1


def _is_plain_jpeg(image: Image.Image) -> bool:
    return image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")


def _decode_jpeg(file: BinaryIO, size: tuple[int, int], factor: int) -> np.ndarray | None:
    """(height, width, 3) uint8 at 1/`factor` of the size; None where Pillow should decide."""
    file.seek(0)
    data = file.read()
    try:
        if simplejpeg.decode_jpeg_header(data)[1::-1] != size:  # no bomb that Pillow cannot see
            return None
        width, height = (-(-side // factor) for side in size)
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_width=width, min_height=height)
    except ValueError:
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def _stored(box: Box, size: tuple[int, int], orientation: int) -> Box:
    """Where a box of the upright image lies in the stored one, whose size is given."""
    left, top, right, bottom = box
    if orientation in SWAPPED:
        left, top, right, bottom = top, left, bottom, right
    if orientation in MIRRORED:
        left, right = size[0] - right, size[0] - left
    if orientation in UPSIDE_DOWN:
        top, bottom = size[1] - bottom, size[1] - top
    return left, top, right, bottom


def _shrunk(box: Box, factor: int) -> Box:
    left, top, right, bottom = ((edge + factor // 2) // factor for edge in box)
    return left, top, right, bottom


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """A view of stored pixels (H, W, 3) that is upright."""
    if orientation in MIRRORED:
        pixels = pixels[:, ::-1]
    if orientation in UPSIDE_DOWN:
        pixels = pixels[::-1]
    if orientation in SWAPPED:
        pixels = pixels.transpose(1, 0, 2)
    return pixels


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()  # TIFF turns itself while it loads, and then has no orientation any more
    orientation = orientation_of(image)
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
    """Rows of an image with the number of their first, so that copies of all need no memory."""
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
    """Greyscale of 16 bits -> 8; convert() would make all over 255 white."""
    values = np.asarray(image).astype(np.uint32)
    grey = ((values + 128) // 257).astype(np.uint8)
    if "transparency" in image.info:  # PNG's: one value that is not to be seen
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")


def _range_of(image: Image.Image) -> tuple[float, float]:
    """The least and the greatest finite value."""
    low, high = np.inf, -np.inf
    for _, band in _bands(image):
        values = np.asarray(band).astype(np.float64)
        finite = values[np.isfinite(values)]
        if finite.size:
            low, high = min(low, finite.min()), max(high, finite.max())
    return (float(low), float(high)) if low <= high else (0.0, 0.0)


def _stretched(image: Image.Image, low: float, high: float) -> Image.Image:
    """Values of any range -> 0 to 255, from `low` to `high`."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64), nan=low, posinf=high, neginf=low)
    grey = np.round((values - low) * (255 / (high - low) if high > low else 0))
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
