"""What a person gives as images -> pixels, decoded in threads while the model works.

    paths, folders, bytes, PIL images, arrays, URLs -> sources -> threads -> (B, 3, R, R) uint8

A folder stands for the images in it, in the order of their paths; an array of four dimensions for
as many images. Nothing is held but the batches that are under way.

Shapes: B batch, R resolution.
"""

import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from leanclip.data.readers.image_files import find_images, suffix_of
from leanclip.errors import DataError, SampleError
from leanclip.io.download import fetch_bytes
from leanclip.io.files import is_url
from leanclip.io.threads import in_threads
from leanclip.preprocess.decoding import Source, open_image
from leanclip.preprocess.image_formats import SUFFIXES
from leanclip.preprocess.images import Preprocess, evaluation_pixels

log = logging.getLogger("leanclip")

ImageInput = Source | np.ndarray
ImageInputs = ImageInput | Iterable[ImageInput]

MAX_URL_BYTES = 64 << 20  # of one image
_KNOWN = "a path, a folder, a URL, bytes, a PIL image or an array"


class Images(NamedTuple):
    """What was given as images, one by one."""

    sources: Iterable[ImageInput]
    total: int | None  # None: an iterator does not say
    is_single: bool  # one image, and no list of one


def expand_inputs(images: ImageInputs) -> Images:
    """The images that are meant; folders are looked through.

    Raises:
        DataError: this is no image and no collection of them, or a folder has none.
    """
    if isinstance(images, np.ndarray) and images.ndim == 4:
        return Images(images, len(images), False)
    if isinstance(images, str | Path) and _is_folder(images):
        paths = _images_in(Path(images))
        return Images(paths, len(paths), False)
    if isinstance(images, ImageInput | bytearray):
        return Images([images], 1, True)
    if isinstance(images, list | tuple):
        sources = list(_expanded(images))
        return Images(sources, len(sources), False)
    if not isinstance(images, Iterable) or isinstance(images, torch.Tensor | dict):
        raise DataError(
            f"images: found {_kind(images)}; give {_KNOWN}, or a list of them "
            f"(normalised pixels go to encode_image)"
        )
    return Images(_expanded(images), None, False)


def pixel_batches(
    sources: Iterable[ImageInput],
    preprocess: Preprocess,
    *,
    batch_size: int,
    workers: int | None = None,
) -> Iterator[torch.Tensor]:
    """Batches of evaluation pixels (B, 3, R, R) uint8, in order; one batch is read ahead.

    Args:
        sources: images, one by one.
        preprocess: of the model.
        batch_size: the most of a batch.
        workers: threads that decode; 0: this one; None: one per CPU core, eight at most, among the
            processes of this machine.

    Raises:
        SampleError: an image cannot be read; it says which one.
        DataError: something given is no image.
    """

    def read(number: int, source: ImageInput) -> np.ndarray:
        try:
            return evaluation_pixels(to_source(source), preprocess)
        except SampleError as error:
            where = "" if isinstance(source, str | Path) else f"image {number}: "
            raise SampleError(error.kind, f"{where}{error}") from None
        except DataError as error:
            raise DataError(f"image {number}: {error}") from None

    arrays = in_threads(read, sources, workers, batch_size)
    while part := list(islice(arrays, batch_size)):
        yield torch.from_numpy(np.stack(part))


def to_source(image: ImageInput) -> Source:
    """An image that can be opened: arrays become PIL images, and so do URLs, which are fetched.

    Raises:
        DataError: it is no image, or a URL that cannot be fetched.
        SampleError: what is at the URL cannot be read as an image.
    """
    if isinstance(image, str) and is_url(image):
        return _fetched_image(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, bytearray):
        return bytes(image)
    if not isinstance(image, Source):
        raise DataError(f"found {_kind(image)}; give {_KNOWN}")
    return image


def _fetched_image(url: str) -> Image.Image:
    content = fetch_bytes(url, limit=MAX_URL_BYTES)
    try:
        return open_image(content)
    except SampleError as error:
        raise SampleError(error.kind, str(error).replace("<bytes>", url, 1)) from None


def _from_array(array: np.ndarray) -> Image.Image:
    """(H, W), (H, W, 1), (H, W, 3) or (H, W, 4): uint8, bool, uint16 grey, or floats in [0, 1]."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise DataError(f"an array of shape {array.shape}; give (height, width, 3), as Pillow does")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise DataError(
                f"an array of {array.dtype} outside [0, 1]; give uint8, or values in [0, 1] "
                f"(normalised pixels go to encode_image)"
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
    """The images under a folder that can be read; the others are named in a warning.

    Raises:
        DataError: there are none.
    """
    paths = find_images(folder)
    images = [path for path in paths if suffix_of(path.name) in SUFFIXES]
    if unread := [path for path in paths if suffix_of(path.name) not in SUFFIXES]:
        names = ", ".join(str(path) for path in unread[:3]) + ", ..." * (len(unread) > 3)
        words = f"{folder}: skipped {len(unread)} images in formats that are not read: {names}"
        if not images:
            raise DataError(f"{words}; convert them to JPEG or PNG")
        log.warning("%s", words)
    return images


def _is_folder(name: str | Path) -> bool:
    """Whether a name is a folder's; one with an image's suffix is not looked up."""
    text = str(name)
    if suffix_of(text) in SUFFIXES or is_url(text):
        return False
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):  # no name that a file can have
        return False


def _kind(value: object) -> str:
    article = "an" if type(value).__name__[0] in "aeiouAEIOU" else "a"
    return "None" if value is None else f"{article} {type(value).__name__}"
