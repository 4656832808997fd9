"""The image files that people really have: each is read as one would expect, or refused by kind."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import noise_image
from PIL import Image, ImageOps
from skimage import data as photographs

from leanclip.errors import DataError, SampleError
from leanclip.preprocess.decoding import Box, open_image, open_part

KINDS_OF_JPEG: tuple[dict[str, Any], ...] = (
    {"subsampling": "4:2:0"},
    {"subsampling": "4:2:2"},
    {"subsampling": "4:4:4"},
    {"progressive": True},
    {"restart_marker_blocks": 5},
    {"keep_rgb": True},
)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def whole(width: int, height: int) -> tuple[Box, int]:
    return (0, 0, width, height), 1


def rgb(source: bytes | Path | Image.Image) -> np.ndarray:
    """The pixels of `open_image`, which are those of `open_part`."""
    image = open_image(source)
    assert image.mode == "RGB"
    pixels = np.asarray(image)
    np.testing.assert_array_equal(open_part(source, whole), pixels)
    return pixels


def refusals(source: bytes | Path, max_pixels: int = 10**6) -> SampleError:
    """The error of `open_image`, which is that of `open_part`."""
    with pytest.raises(SampleError) as first:
        open_image(source, max_pixels=max_pixels)
    with pytest.raises(SampleError) as second:
        open_part(source, whole, max_pixels=max_pixels)
    assert (first.value.kind, str(first.value)) == (second.value.kind, str(second.value))
    return first.value


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF"])
def test_formats(kind: str) -> None:
    file = io.BytesIO()
    noise_image(2).save(file, kind)
    image = open_image(file.getvalue())
    assert (image.mode, image.size) == ("RGB", (48, 40))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1"])
def test_modes_become_rgb(mode: str) -> None:
    assert open_image(noise_image(3).convert(mode)).mode == "RGB"


def test_transparent_parts_are_white() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    assert list(np.asarray(open_image(image)).reshape(-1, 3).tolist()) == [
        [255, 255, 255],
        [255, 0, 0],
    ]


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "words.jpg").write_text("not an image")
    png = io.BytesIO()
    noise_image(4).save(png, "PNG")
    (tmp_path / "cut.png").write_bytes(png.getvalue()[:200])
    (tmp_path / "empty.png").touch()
    for name in ("words.jpg", "cut.png", "empty.png"):
        with pytest.raises(DataError, match=f"{name}: cannot be read as an image"):
            open_image(tmp_path / name)
    with pytest.raises(DataError, match=r"no\.png: no such image"):
        open_image(tmp_path / "no.png")


def test_postscript_is_never_handed_to_ghostscript() -> None:
    with pytest.raises(DataError, match="cannot be read as an image"):
        open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    with pytest.raises(DataError, match=r"400000000 pixels.* exceeds limit"):
        open_image(file.getvalue())
    with pytest.raises(DataError, match="48x40 pixels are over the limit of 1000"):
        open_image(noise_image(0), max_pixels=1000)


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket", "camera"])
@pytest.mark.parametrize("options", KINDS_OF_JPEG, ids=str)
def test_jpeg_is_decoded_as_pillow_decodes_it(name: str, options: dict[str, Any]) -> None:
    image = Image.fromarray(getattr(photographs, name)()[:-3, :-5])
    data = encoded(image, "JPEG", quality=90, **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(rgb(data), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 9])
def test_images_are_turned_as_exif_says(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise_image(0, (61, 43)), kind, exif=exif.tobytes())
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(rgb(data), np.asarray(expected))
    box = (5, 3, 31, 22)
    part = open_part(data, lambda width, height: (box, 1))
    np.testing.assert_array_equal(part, np.asarray(expected.crop(box)))


def test_orientation_may_stand_in_xmp() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(noise_image(0, (61, 43)), "JPEG", xmp=xmp)
    assert rgb(data).shape == (61, 43, 3)


@pytest.mark.parametrize(
    "block",
    [b"Exif\0\0", b"Exif\0\0MM", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\x07" * 90],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_exif_block_does_not_cost_the_image(kind: str, block: bytes) -> None:
    image = noise_image(0, (61, 43))
    assert rgb(encoded(image, kind, exif=block)).shape == (43, 61, 3)


def test_a_part_of_a_jpeg_can_be_decoded_smaller() -> None:
    image = Image.fromarray(photographs.rocket())  # 640x427
    data = encoded(image, "JPEG", quality=90)
    for factor in (1, 2, 4, 8):
        part = open_part(data, lambda w, h, f=factor: ((80, 16, 240, 176), f))
        assert part.shape == (160 // factor, 160 // factor, 3)
        small = image.crop((80, 16, 240, 176)).reduce(factor)
        assert np.abs(part - np.asarray(small, float)).mean() < 3
    png = open_part(encoded(image, "PNG"), lambda w, h: ((80, 16, 240, 176), 8))
    np.testing.assert_array_equal(png, np.asarray(image.crop((80, 16, 240, 176))))


def test_cmyk_is_converted() -> None:
    data = encoded(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(rgb(data) - np.array([255.0, 0, 0])).max() < 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_rescaled(kind: str) -> None:
    values = np.array([[0, 128, 129, 257, 32896, 65535]], np.uint16)
    pixels = rgb(encoded(Image.fromarray(values), kind))
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]


def test_16_bits_with_a_transparent_value() -> None:
    values = np.array([[0, 1000, 65535]], np.uint16)
    pixels = rgb(encoded(Image.fromarray(values), "PNG", transparency=1000))
    assert pixels[0, :, 1].tolist() == [0, 255, 255]


@pytest.mark.parametrize(
    ("values", "grey"),
    [
        (np.array([[-70_000, 0, 70_000]], np.int32), [0, 128, 255]),
        (np.array([[0.0, 0.25, 1.0]], np.float32), [0, 64, 255]),
        (np.array([[np.nan, -np.inf, 2.0, 4.0, np.inf]], np.float32), [0, 0, 0, 255, 255]),
        (np.array([[5.0, 5.0]], np.float32), [0, 0]),
        (np.array([[np.nan]], np.float32), [0]),
    ],
)
def test_wide_numbers_are_stretched(values: np.ndarray, grey: list[int]) -> None:
    assert rgb(encoded(Image.fromarray(values), "TIFF"))[0, :, 2].tolist() == grey


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_colour_is_white(kind: str) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    pixels = rgb(encoded(image, kind, transparency=0))
    assert pixels[0].tolist() == [[255, 255, 255], [0, 0, 255]]


def test_a_palette_of_half_transparent_colours_is_mixed_with_white() -> None:
    image = Image.new("P", (1, 1))
    image.putpalette([255, 0, 0])
    pixels = rgb(encoded(image, "PNG", transparency=bytes([51])))
    assert pixels[0, 0].tolist() == [255, 204, 204]


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA", "RGBa"])
def test_hidden_colours_do_not_show(mode: str) -> None:
    image = Image.new("LA", (1, 1), (90, 0)).convert("RGBA")
    assert rgb(image.convert(mode))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_many_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(data)) as image:
        assert getattr(image, "n_frames", 1) == 3
    assert np.abs(rgb(data) - np.array([255.0, 0, 0])).max() < 4


def test_a_file_is_what_it_holds_not_what_its_name_says(tmp_path: Path) -> None:
    image = noise_image(0)
    image.save(tmp_path / "a.jpg", "PNG")
    np.testing.assert_array_equal(rgb(tmp_path / "a.jpg"), np.asarray(image))


@pytest.mark.parametrize("options", KINDS_OF_JPEG, ids=str)
def test_cut_jpegs_are_damaged_wherever_they_are_cut(options: dict[str, Any]) -> None:
    data = encoded(Image.fromarray(photographs.chelsea()), "JPEG", **options)
    for length in (100, len(data) // 10, len(data) // 2, len(data) - 100, len(data) - 1):
        assert refusals(data[:length]).kind == "damaged image"


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "BMP", "WEBP"])
def test_cut_files_are_damaged(kind: str) -> None:
    data = encoded(Image.fromarray(photographs.chelsea()), kind)
    for share in (0.4, 0.6, 0.9):
        assert refusals(data[: int(share * len(data))]).kind in ("damaged image", "not an image")


def test_bytes_changed_at_random_are_read_as_pillow_reads_them_or_refused() -> None:
    rng = np.random.default_rng(0)
    good = encoded(Image.fromarray(photographs.coffee()).resize((150, 100)), "JPEG")
    refused = 0
    for _ in range(300):
        data = bytearray(good)
        for _ in range(3):
            data[rng.integers(len(data))] = rng.integers(256)
        try:
            open_image(bytes(data), max_pixels=10**6)
        except SampleError:
            refusals(bytes(data))
            refused += 1
        else:
            rgb(bytes(data))
    assert 10 < refused < 290


def test_kinds_of_refusal(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "words.jpg").write_text("not an image")
    (tmp_path / "folder.jpg").mkdir()
    for name, kind, words in (
        ("empty.jpg", "empty file", "it is empty"),
        ("words.jpg", "not an image", "none of JPEG, PNG, BMP, WEBP, GIF, TIFF"),
        ("folder.jpg", "unreadable file", "Is a directory"),
        ("none.jpg", "missing file", "no such image"),
        ("words.jpg/a.jpg", "unreadable file", "Not a directory"),
        ("a\0b.jpg", "damaged image", "null byte"),
    ):
        error = refusals(tmp_path / name)
        assert error.kind == kind
        assert str(error).startswith(f"{tmp_path / name}: ".replace("\0", r"\x00"))
        assert words in str(error)
    assert refusals(b"").kind == "empty file"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP"])
def test_bombs_are_refused_by_the_header(kind: str) -> None:
    data = encoded(Image.new("RGB", (1001, 1000)), kind)
    # Cut off behind the header: whoever decodes the pixels finds another fault.
    head = data[:1000] if kind not in ("TIFF", "WEBP") else data
    error = refusals(head, max_pixels=1_000_999)
    assert error.kind == "too many pixels"
    assert "1001x1000 pixels are over the limit of 1000999" in str(error)
    assert open_image(data, max_pixels=1_001_000).size == (1001, 1000)


def test_a_jpeg_whose_header_lies_is_refused() -> None:
    data = bytearray(encoded(noise_image(0), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"  # 65500x65500
    assert refusals(bytes(data)).kind == "too many pixels"
    assert refusals(bytes(data), max_pixels=2**40).kind == "too many pixels"  # Pillow's own limit


def test_an_image_without_pixels_is_refused() -> None:
    with pytest.raises(SampleError, match="no pixels"):
        open_image(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1)])
def test_thin_images(size: tuple[int, int]) -> None:
    for kind in ("JPEG", "PNG", "GIF"):
        assert rgb(encoded(noise_image(1, size), kind)).shape == (size[1], size[0], 3)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", Path("/dev/zero"), tmp_path):
        with pytest.raises(SampleError, match="cannot be read as an image") as caught:
            open_image(path)
        assert caught.value.kind == "unreadable file"
