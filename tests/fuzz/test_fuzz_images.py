"""Images of every format, edited: decoded, or refused in one line; never slow or large."""

import io
import re
from typing import Any

import numpy as np
import pytest
from conftest import noise_image
from hypothesis import given
from mutations import EDITS, Edits, bounded, check_words, edited, examples
from PIL import Image

from leanclip.data.dataset import Sample
from leanclip.data.scaled_decode import image_bytes, is_rotated, open_header, open_scaled
from leanclip.errors import LeanclipError, SampleError
from leanclip.preprocess.crops import training_pixels
from leanclip.preprocess.decoding import MAX_SCANS, open_image
from leanclip.preprocess.images import Preprocess, evaluation_pixels

MANY = 4_000_000  # the most pixels in these tests

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _seeds() -> dict[str, bytes]:
    image = noise_image(1, (60, 44))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [noise_image(i, (20, 20)) for i in range(3)]
    return {
        "jpeg": saved(image, "JPEG", exif=exif),
        "progressive.jpeg": saved(image, "JPEG", progressive=True),
        "cmyk.jpeg": saved(image.convert("CMYK"), "JPEG"),
        "mpo": saved(image, "MPO", save_all=True, append_images=frames),
        "png": saved(image.convert("RGBA"), "PNG", exif=exif),
        "grey16.png": saved(
            Image.fromarray(np.arange(300, dtype=np.uint16).reshape(15, 20)), "PNG"
        ),
        "palette.png": saved(image.quantize(16), "PNG", transparency=3),
        "apng": saved(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:], transparency=1),
        "webp": saved(image, "WEBP", exif=exif),
        "alpha.webp": saved(image.convert("RGBA"), "WEBP", lossless=True),
        "moving.webp": saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "bmp": saved(image, "BMP"),
        "tiff": saved(image, "TIFF", exif=exif),
        "deflate.tiff": saved(image.convert("F"), "TIFF", compression="tiff_deflate"),
        "lzw.tiff": saved(image, "TIFF", compression="tiff_lzw"),
        "jpeg.tiff": saved(image, "TIFF", compression="jpeg"),
        "bits.tiff": saved(image.convert("1"), "TIFF", compression="group4"),
    }


SEEDS = _seeds()
_SIGNS = (
    rb"\xff[\xc0-\xcf\xd8-\xfe]|IHDR|IDAT|PLTE|tRNS|eXIf|acTL|fcTL|VP8.|ANIM|ANMF|Exif|II\*|MM\0"
)
MARKS = {
    name: [0, 4, 6, 8, 16, 22, 28, *(found.start() for found in re.finditer(_SIGNS, data))]
    for name, data in SEEDS.items()
}


def everything(data: bytes) -> None:
    """All that is done with an image from elsewhere; each part may refuse it."""
    for read in (
        lambda: evaluation_pixels(data, Preprocess(32), max_pixels=MANY),
        lambda: training_pixels(
            data,
            Preprocess(16),
            np.random.default_rng(0),
            scale=(0.5, 1),
            ratio=(0.7, 1.4),
            max_pixels=MANY,
        ),
        lambda: packed(data),
    ):
        try:
            read()
        except LeanclipError as error:
            check_words(error)


def packed(data: bytes) -> None:
    image = open_header(image_bytes(Sample("x", data, ())), max_pixels=MANY)
    is_rotated(image)
    open_scaled(image, 16, max_pixels=MANY)


@pytest.mark.parametrize("name", SEEDS)
@examples(8)
@given(EDITS)
def test_an_image(name: str, edits: Edits) -> None:
    data = edited(SEEDS[name], edits, MARKS[name])
    with bounded(data, f"image.{name}", megabytes=200):
        everything(data)


def test_the_seeds_are_images() -> None:
    for name, data in SEEDS.items():
        assert evaluation_pixels(data, Preprocess(32)).shape == (3, 32, 32), name


@pytest.mark.parametrize("is_progressive", [True, False])
def test_a_jpeg_of_thousands_of_scans_is_refused(is_progressive: bool) -> None:
    image = Image.new("L", (64, 64), 90) if is_progressive else Image.new("RGB", (64, 64))
    data = saved(image, "JPEG", progressive=is_progressive)
    last = data[data.rindex(b"\xff\xda") : -2]
    many = data[:-2] + last * (MAX_SCANS + 1) + data[-2:]
    for read in (open_image, lambda data: packed(data)):
        with pytest.raises(SampleError, match=r"over 100 scans"):
            read(many)
    # Scans behind the end, as of films that are JPEGs in a row, or within a block, are not its own.
    assert open_image(data * 200).size == (64, 64)
    block = b"\xff\xe1" + (60_002).to_bytes(2, "big") + b"\xff\xda" * 30_000
    assert open_image(data[:2] + block + data[2:]).size == (64, 64)


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "F", "I"])
def test_what_is_converted_in_bands_is_the_whole(monkeypatch: Any, mode: str) -> None:
    values = np.random.default_rng(0).integers(0, 255, (50, 40, 4))
    kind = {"RGBA": np.uint8, "I;16": np.uint16, "F": np.float32, "I": np.int32}[mode]
    array = (values if mode == "RGBA" else values[:, :, 0] * 200).astype(kind)
    whole = np.asarray(open_image(Image.fromarray(array)))
    monkeypatch.setattr("leanclip.preprocess.decoding._BAND", 300)
    np.testing.assert_array_equal(np.asarray(open_image(Image.fromarray(array))), whole)
