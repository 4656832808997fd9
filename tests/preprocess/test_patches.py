"""Images as patches (NaFlex), beside transformers' processor, pixel by pixel."""

import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROJECT, noise_image
from photographs import photograph
from PIL import Image
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

import leanclip
from leanclip.errors import ConfigError
from leanclip.inference.attention_maps import gradient_map, rollout
from leanclip.preprocess.crops import training_pixels
from leanclip.preprocess.images import Preprocess, evaluation_pixels, normalize, view
from leanclip.preprocess.patches import Patches, patched_size, stack_patches

GOLDEN = PROJECT / "tests/data/modern/hf-siglip2-naflex"
HALF = (0.5, 0.5, 0.5)
NAFLEX = Preprocess(
    40, HALF, HALF, resize="naflex", interpolation="bilinear", patch_size=8, max_patches=40
)
SIZES = ((64, 48), (48, 64), (1, 1), (1, 900), (900, 1), (7, 3000), (333, 100), (80, 32), (8, 8))


@pytest.mark.parametrize(("patch_size", "max_patches"), [(8, 40), (16, 256), (14, 1), (5, 7)])
def test_pixels_are_those_of_transformers(patch_size: int, max_patches: int) -> None:
    theirs = Siglip2ImageProcessorPil(patch_size=patch_size, max_num_patches=max_patches)
    preprocess = replace(NAFLEX, patch_size=patch_size, max_patches=max_patches)
    for number, size in enumerate(SIZES):
        image = noise_image(number, size)
        expected = theirs(images=[image], return_tensors="pt")
        found = preprocess(image)
        assert isinstance(found, Patches)
        torch.testing.assert_close(
            found.values, expected["pixel_values"].float(), rtol=0, atol=1e-6
        )
        assert torch.equal(found.mask.int(), expected["pixel_attention_mask"])
        assert torch.equal(found.shapes, expected["spatial_shapes"])


def test_the_golden_pixels_are_equal() -> None:
    golden = np.load(GOLDEN / "io.npz")
    images = [photograph(name) for name in ("chelsea", "coffee", "rocket")]
    images.append(images[0].crop((40, 20, 90, 290)))
    found = [one for image in images if isinstance(one := NAFLEX(image), Patches)]
    np.testing.assert_array_equal(torch.cat([p.values for p in found]), golden["pixel_values"])
    np.testing.assert_array_equal(torch.cat([p.shapes for p in found]), golden["spatial_shapes"])


def test_a_size_has_the_most_patches_in_its_proportions() -> None:
    rng = np.random.default_rng(0)
    for height, width in np.exp(rng.uniform(0, 9, (200, 2))).astype(int).tolist():
        h, w = (side // 16 for side in patched_size(height, width, 16, 256))
        assert 0 < h * w <= 256
        larger = (math.ceil(height * h / height + 0.01), math.ceil(width * w / width + 0.01))
        assert larger[0] * larger[1] > 256 or max(height, width) < 41  # scaled at most by 100


def test_a_batch_is_padded_split_and_moved_together() -> None:
    images = [noise_image(n, size) for n, size in enumerate(SIZES)]
    pixels = NAFLEX.stack([evaluation_pixels(image, NAFLEX) for image in images])
    assert isinstance(pixels, Patches)
    assert pixels.values.shape == (len(SIZES), *NAFLEX.shape_of_image())
    assert not pixels.values[~pixels.mask].any()
    for parts in (pixels.split(4), pixels.tensor_split(4), pixels.tensor_split(20)):
        assert torch.equal(torch.cat([part.values for part in parts]), pixels.values)
        assert torch.equal(torch.cat([part.shapes for part in parts]), pixels.shapes)
    normalised = normalize(pixels, HALF, HALF)
    assert not normalised.values[~pixels.mask].any()
    one = NAFLEX(images[1])
    assert isinstance(one, Patches)
    assert torch.equal(one.values, normalised[1:2].values)
    assert normalised.to(torch.float64).values.dtype == torch.float64


@pytest.mark.parametrize("size", [(200, 80), (80, 200), (5, 700), (40, 40)])
@pytest.mark.parametrize("most", [4, 40])
def test_a_training_crop_keeps_its_proportions(size: tuple[int, int], most: int) -> None:
    preprocess = replace(NAFLEX, max_patches=most)
    for seed in range(10):
        pixels = training_pixels(
            noise_image(seed, size), preprocess, np.random.default_rng(seed),
            scale=(0.5, 1), ratio=(0.9, 1.1),
        )  # fmt: skip
        h, w = (side // 8 for side in pixels.shape[1:])
        assert 0 < h * w <= most
        own = size[1] / size[0] / np.array([1.1, 0.9])  # height / width of the crop
        if h > 1 and w > 1:
            low, high = own[0] * 0.8, own[1] * 1.2
            assert (h - 1) / w < high
            assert h / (w - 1) > low
    whole = training_pixels(
        noise_image(1, size), preprocess, np.random.default_rng(0), scale=(1, 1), ratio=(1, 1)
    )
    assert whole.shape == evaluation_pixels(noise_image(1, size), preprocess).shape


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_patches": 0}, "max_patches: 0"),
        ({"max_patches": None}, "max_patches: None goes with resize naflex"),
        ({"patch_size": -3}, "patch_size: -3"),
        ({"patch_size": 8.5}, "patch_size: 8.5"),
        ({"max_patches": "40"}, "max_patches: 40 is not"),
        ({"resize": "squash"}, "patch_size: 8 goes with resize naflex, and only with it"),
        ({"resize": "na-flex"}, "resize: 'na-flex' is not one of"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], words: str) -> None:
    values = asdict(NAFLEX) | changes
    with pytest.raises(ValueError, match=words.split(":")[0]) as caught:
        Preprocess.from_dict(values)
    assert words in str(caught.value)


def test_it_is_stored_and_shown() -> None:
    assert Preprocess.from_dict(asdict(NAFLEX)) == NAFLEX
    assert NAFLEX.at(80).max_patches == 40
    assert view(noise_image(0, (200, 100)), NAFLEX, 50).size == (50, 25)
    assert view(Image.new("RGB", (3000, 1)), NAFLEX, 50).size == (50, 1)


def test_patches_of_one_shape_are_pixels_again() -> None:
    images = [np.random.default_rng(i).integers(0, 256, (3, 16, 24), np.uint8) for i in range(2)]
    patches = stack_patches(images, 8, 9)
    assert torch.equal(patches.pixels(), torch.from_numpy(np.stack(images)))
    with pytest.raises(ConfigError, match="several shapes; give those of one image"):
        stack_patches([images[0], images[1][:, :8]], 8, 9).pixels()


def test_maps_of_patches_are_those_of_their_pixels() -> None:
    clip = leanclip.load(GOLDEN, device="cpu")
    pixels: Any = clip.preprocess(photograph("chelsea"))
    text = clip.embed_texts("a cat", as_torch=True)
    rows, columns = pixels.shapes[0].tolist()
    for found, expected in (
        (rollout(clip.model, pixels), rollout(clip.model, pixels.pixels())),
        (gradient_map(clip.model, pixels, text), gradient_map(clip.model, pixels.pixels(), text)),
    ):
        assert found.shape == (1, rows, columns)
        assert torch.equal(found, expected)
