"""Images against the reference pipeline written out, and the files people really have."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise_image
from PIL import Image
from skimage import data as photographs

from leanclip import Preprocess
from leanclip.errors import DataError
from leanclip.images import CLIP_MEAN, CLIP_STD, center_crop, open_image, random_crop


def reference(image: Image.Image, size: int) -> np.ndarray:
    """OpenAI's transform: torchvision's Resize, CenterCrop, ToTensor and Normalize, in NumPy."""
    w, h = image.size
    new = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    image = image.resize(new, Image.Resampling.BICUBIC)
    top, left = round((new[1] - size) / 2.0), round((new[0] - size) / 2.0)
    image = image.crop((left, top, left + size, top + size)).convert("RGB")
    x = np.asarray(image, np.float32).transpose(2, 0, 1) / np.float32(255)
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    return (x - mean) / std


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket", "camera", "page"])
@pytest.mark.parametrize("size", [224, 65])
def test_preprocess_equals_the_reference_on_photographs(name: str, size: int) -> None:
    image = Image.fromarray(getattr(photographs, name)())
    ours = Preprocess(size)(image)
    assert ours.shape == (3, size, size)
    assert ours.dtype == torch.float32
    np.testing.assert_array_equal(ours.numpy(), reference(image, size))


@pytest.mark.parametrize("size", [(31, 47), (47, 31), (224, 224), (1, 5), (333, 225), (225, 334)])
def test_preprocess_equals_the_reference_on_odd_sizes(size: tuple[int, int]) -> None:
    image = noise_image(0, size)
    np.testing.assert_array_equal(Preprocess(224)(image).numpy(), reference(image, 224))


def test_path_bytes_and_image_are_the_same(tmp_path: Path) -> None:
    image = noise_image(1)
    image.save(tmp_path / "a.png")
    preprocess = Preprocess(32)
    expected = preprocess(image)
    assert torch.equal(preprocess(tmp_path / "a.png"), expected)
    assert torch.equal(preprocess(str(tmp_path / "a.png")), expected)
    assert torch.equal(preprocess((tmp_path / "a.png").read_bytes()), expected)


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


def test_an_image_too_long_to_resize_is_refused() -> None:
    with pytest.raises(DataError, match=r"30000x1 .* too long"):
        center_crop(Image.new("RGB", (30_000, 1)), 224)


def test_random_crops_keep_to_their_scale_and_ratio() -> None:
    # Pixel values tell where they came from: red grows to the right, green downwards.
    y, x = np.mgrid[0:200, 0:250].astype(np.uint8)
    image = Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=2))
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(200):
        crop = np.asarray(random_crop(image, 64, rng, scale=(0.3, 0.6), ratio=(0.5, 2.0)))
        assert crop.shape == (64, 64, 3)
        width, height = (
            64 / 63 * (float(crop[32, -1, 0]) - float(crop[32, 0, 0])),
            64 / 63 * (float(crop[-1, 32, 1]) - float(crop[0, 32, 1])),
        )
        areas.append(width * height / (200 * 250))
        assert 0.45 < width / height < 2.2
    assert 0.28 < min(areas) < 0.35
    assert 0.55 < max(areas) < 0.63


def test_the_whole_image_is_the_crop_of_scale_one() -> None:
    image = noise_image(5, (60, 60))
    crop = random_crop(image, 30, np.random.default_rng(0), scale=(1, 1), ratio=(1, 1))
    assert crop.tobytes() == image.resize((30, 30), Image.Resampling.BICUBIC).tobytes()


def test_a_crop_that_cannot_fit_is_taken_from_the_middle() -> None:
    image = noise_image(6, (400, 10))
    crop = random_crop(image, 8, np.random.default_rng(0), scale=(1, 1), ratio=(0.75, 1.25))
    middle = image.resize((8, 8), Image.Resampling.BICUBIC, box=(194, 0, 206, 10))
    assert crop.tobytes() == middle.tobytes()
