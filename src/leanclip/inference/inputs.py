"""Images as users give them -> pixels, decoded in threads while the model works.

    paths, folders, bytes, PIL images, arrays, URLs -> sources -> threads -> (B, 3, R, R) uint8

A folder stands for the images in it and below it, in the order of their paths; an array of four
dimensions for a list of images. Only the batches under way are in memory.

Shapes: H height, W width, B batch, R resolution.
"""

import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from leanclip.data.readers.image_files import find_images, suffix_of
from leanclip.errors import DataError, SampleError
from leanclip.io.download import fetch_bytes
from leanclip.io.files import is_url
from leanclip.io.threads import map_in_threads
from leanclip.preprocess.decoding import Source, open_image
from leanclip.preprocess.image_formats import SUFFIXES
from leanclip.preprocess.images import Preprocess, evaluation_pixels

log = logging.getLogger("leanclip")

ImageInput = Source | np.ndarray
ImageInputs = ImageInput | Iterable[ImageInput]

MAX_URL_BYTES = 64 << 20  # of one image
_KNOWN = "a path, a folder, a URL, bytes, a PIL image or an array"


class Images(NamedTuple):
    """Images, one by one."""

    sources: Iterable[ImageInput]
    total: int | None  # None: unknown, as for an iterator
    is_single: bool  # one image, not a list of one


def expand_inputs(images: ImageInputs) -> Images:
    """One image, or each of several; folders are replaced by the images in them.

    Raises:
        DataError: this is neither an image nor a collection, or a folder has no images.
    """
    if isinstance(images, str | Path) and _is_folder(images):
        images = _images_in(Path(images))
    elif isinstance(images, Source) or (isinstance(images, np.ndarray) and images.ndim != 4):
        return Images([images], 1, True)
    if not isinstance(images, Iterable) or isinstance(images, torch.Tensor | dict):
        raise DataError(
            f"images: found {_type_of(images)}; give {_KNOWN}, or a list of them "
            f"(for normalised pixels, use encode_image)"
        )
    sources = _expanded(images)
    if not isinstance(images, list | tuple | np.ndarray):
        return Images(sources, None, False)
    sources = list(sources)
    return Images(sources, len(sources), False)


def pixel_batches(
    sources: Iterable[ImageInput],
    preprocess: Preprocess,
    *,
    batch_size: int,
    workers: int | None = None,
) -> Iterator[torch.Tensor | Any]:
    """Evaluation pixels (B, 3, R, R) uint8, or patches, in batches, in order; one is read ahead.

    Args:
        sources: images, one by one.
        preprocess: of the model.
        batch_size: maximum B.
        workers: threads that decode; 0: the calling one; None: one per CPU core of this process,
            at most eight.

    Raises:
        SampleError: an image cannot be read; it names the image.
        DataError: an item is not an image.
    """

    def read(number: int, source: ImageInput) -> np.ndarray:
        try:
            return evaluation_pixels(to_source(source), preprocess)
        except SampleError as error:
            where = "" if isinstance(source, str | Path) else f"image {number}: "
            raise SampleError(error.kind, f"{where}{error}") from None
        except DataError as error:
            raise DataError(f"image {number}: {error}") from None

    arrays = map_in_threads(read, sources, workers, batch_size)
    while part := list(islice(arrays, batch_size)):
        yield preprocess.stack(part)


def to_source(image: ImageInput) -> Source:
    """An image as the decoder takes it: arrays become PIL images, and URLs are fetched.

    Raises:
        DataError: it is not an image, or a URL that cannot be fetched.
        SampleError: the content of the URL is not an image.
    """
    if isinstance(image, str) and is_url(image):
        try:
            return open_image(fetch_bytes(image, limit=MAX_URL_BYTES))
        except SampleError as error:
            raise SampleError(error.kind, str(error).replace("<bytes>", image, 1)) from None
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if not isinstance(image, Source):
        raise DataError(f"found {_type_of(image)}; give {_KNOWN}")
    return image


def _from_array(array: np.ndarray) -> Image.Image:
    """(H, W), (H, W, 1), (H, W, 3) or (H, W, 4): uint8, bool, uint16 grey, or floats in [0, 1]."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        raise DataError(f"an array of shape {array.shape}; give (height, width, 3), as Pillow does")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise DataError(
                f"an array of {array.dtype} outside [0, 1]; give uint8, or values in [0, 1] "
                f"(for normalised pixels, use encode_image)"
            )
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8 and not (array.dtype == np.uint16 and array.ndim == 2):
        raise DataError(f"an array of {array.dtype}; give uint8, or floats in [0, 1]")
    return Image.fromarray(np.ascontiguousarray(array))


def _expanded(images: Iterable[ImageInput]) -> Iterator[ImageInput]:
    for image in images:
        if isinstance(image, str | Path) and _is_folder(image):
            yield from _images_in(Path(image))
        else:
            yield image


def _images_in(folder: Path) -> list[Path]:
    """The images in a folder in formats that can be read; the others are listed in a warning.

    Raises:
        DataError: there are none.
    """
    paths = find_images(folder)
    images = [path for path in paths if suffix_of(path.name) in SUFFIXES]
    if unread := [path for path in paths if suffix_of(path.name) not in SUFFIXES]:
        names = ", ".join(map(str, unread[:3])) + ", ..." * (len(unread) > 3)
        message = f"{folder}: skipped {len(unread)} images in unsupported formats: {names}"
        if not images:
            raise DataError(f"{message}; convert them to JPEG or PNG")
        log.warning("%s", message)
    return images


def _is_folder(name: str | Path) -> bool:
    """Whether this is the path of a folder; names with an image's suffix are not looked up."""
    text = str(name)
    if suffix_of(text) in SUFFIXES or is_url(text):
        return False
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):  # not a valid path
        return False


def _type_of(value: object) -> str:
    article = "an" if type(value).__name__[0] in "aeiouAEIOU" else "a"
    return "None" if value is None else f"{article} {type(value).__name__}"
