"""Evaluation and training pixels against the reference pipelines, written out with Pillow."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import noise_image
from PIL import Image
from skimage import data as photographs

from leanclip import Preprocess
from leanclip.errors import DataError, SampleError
from leanclip.preprocess.crops import decoding_factor, draw_box, training_pixels
from leanclip.preprocess.images import (
    CLIP_MEAN,
    CLIP_STD,
    center_crop,
    evaluation_pixels,
    to_array,
)

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "camera")
KINDS_OF_JPEG: tuple[dict[str, Any], ...] = (
    {"subsampling": "4:2:0"},
    {"subsampling": "4:4:4"},
    {"subsampling": "4:2:0", "progressive": True},
)
WHOLE: dict[str, Any] = {"scale": (1, 1), "ratio": (0.1, 10)}
USUAL: dict[str, Any] = {"scale": (0.9, 1.0), "ratio": (3 / 4, 4 / 3)}


def photograph(name: str) -> Image.Image:
    return Image.fromarray(getattr(photographs, name)())


def jpeg(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, **options)
    return file.getvalue()


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


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("options", KINDS_OF_JPEG, ids=str)
def test_evaluation_of_jpeg_equals_the_reference(name: str, options: dict[str, Any]) -> None:
    data = jpeg(photograph(name), **options)
    expected = reference(Image.open(io.BytesIO(data)), 224)
    np.testing.assert_array_equal(Preprocess(224)(data).numpy(), expected)
    pixels = evaluation_pixels(data, Preprocess(224))
    assert (pixels.shape, pixels.dtype) == ((3, 224, 224), np.uint8)


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
        crop = training_pixels(image, Preprocess(64), rng, scale=(0.3, 0.6), ratio=(0.5, 2.0))
        crop = crop.transpose(1, 2, 0)
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
    box = draw_box(60, 60, np.random.default_rng(0), scale=(1, 1), ratio=(1, 1))
    assert box == (0, 0, 60, 60)


def test_a_crop_that_cannot_fit_is_taken_from_the_middle() -> None:
    box = draw_box(400, 10, np.random.default_rng(0), scale=(1, 1), ratio=(0.75, 1.25))
    assert box == (194, 0, 206, 10)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("options", KINDS_OF_JPEG, ids=str)
def test_training_pixels_are_those_of_a_crop_resized_by_pillow(
    name: str, options: dict[str, Any]
) -> None:
    data = jpeg(photograph(name), **options)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    for size, allowed in ((96, 1), (224, 1), (700, 2)):
        rng = np.random.default_rng(3)
        pixels = training_pixels(data, Preprocess(size), rng, scaled_decoding=False, **USUAL)
        assert (pixels.shape, pixels.dtype) == ((3, size, size), np.uint8)
        assert pixels.flags.c_contiguous
        part = image.crop(draw_box(*image.size, np.random.default_rng(3), **USUAL))
        expected = to_array(part.resize((size, size), Image.Resampling.BICUBIC))
        assert np.abs(pixels.astype(int) - expected).max() <= allowed


def test_training_pixels_depend_on_the_state_of_the_generator_alone() -> None:
    data = jpeg(photograph("coffee"))
    first, again, other = (
        training_pixels(
            data, Preprocess(64), np.random.default_rng(seed), scale=(0.3, 0.6), ratio=(1, 1)
        )
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_training_pixels_are_the_same_of_path_bytes_and_image(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(photograph("chelsea")))
    data = (tmp_path / "a.jpg").read_bytes()
    sources = (tmp_path / "a.jpg", str(tmp_path / "a.jpg"), data, Image.open(io.BytesIO(data)))
    # At 224 nothing is decoded smaller, which a PIL image never is.
    first, *others = (
        training_pixels(source, Preprocess(224), np.random.default_rng(0), **USUAL)
        for source in sources
    )
    for other in others:
        np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize(
    ("short", "factor"), [(1, 1), (299, 1), (300, 2), (599, 2), (600, 4), (1199, 4), (1200, 8)]
)
def test_a_part_decoded_smaller_keeps_half_as_much_again_as_is_wanted(
    short: int, factor: int
) -> None:
    assert decoding_factor((7, 11, 7 + short, 11 + 3000), 100) == factor
    assert decoding_factor((7, 11, 7 + 3000, 11 + short), 100) == factor


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket"])
def test_scaled_decoding_differs_little_and_can_be_switched_off(name: str) -> None:
    data = jpeg(photograph(name).resize((1600, 1200), Image.Resampling.BICUBIC))
    for resolution in (90, 190, 380):  # 1/8, 1/4 and 1/2
        scaled, full = (
            training_pixels(
                data, Preprocess(resolution), np.random.default_rng(0), scaled_decoding=on, **WHOLE
            ).astype(int)
            for on in (True, False)
        )
        assert 0 < np.abs(scaled - full).mean() < 1
        image = Image.open(io.BytesIO(data))
        expected = image.resize((resolution, resolution), Image.Resampling.BICUBIC)
        assert np.abs(full - to_array(expected)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_scaled_decoding_does_not_change_the_part_that_is_seen(orientation: int) -> None:
    # Red grows to the right, green downwards, by one level in 6.3 pixels; the half decoded
    # pixel that an edge may move by is 2 pixels here.
    y, x = np.mgrid[0:1203, 0:1601] / 6.3
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))
    data = jpeg(image, subsampling="4:4:4", exif=exif.tobytes())
    for seed in range(3):
        scaled, full = (
            training_pixels(
                data,
                Preprocess(100),
                np.random.default_rng(seed),
                scale=(0.5, 0.6),
                ratio=(3 / 4, 4 / 3),
                scaled_decoding=on,
            ).mean(axis=(1, 2), dtype=float)
            for on in (True, False)
        )
        assert np.abs(scaled - full).max() < 2 / 6.3 + 0.05


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (2, 3), (17, 4001)])
def test_training_pixels_of_odd_sizes(size: tuple[int, int]) -> None:
    data = jpeg(noise_image(7, size))
    for seed in range(5):
        pixels = training_pixels(data, Preprocess(24), np.random.default_rng(seed), **USUAL)
        assert pixels.shape == (3, 24, 24)


def test_training_refuses_what_evaluation_refuses() -> None:
    data = jpeg(photograph("rocket"))
    for read in (
        lambda data, limit: evaluation_pixels(data, Preprocess(32), max_pixels=limit),
        lambda data, limit: training_pixels(
            data, Preprocess(32), np.random.default_rng(0), max_pixels=limit, **USUAL
        ),
    ):
        with pytest.raises(SampleError, match="640x427 pixels are over the limit of 9999"):
            read(data, 9999)
        with pytest.raises(SampleError, match="cannot be read as an image"):
            read(data[: len(data) // 2], 10**6)
