"""`InferenceModel`: features, similarities, labels and rankings, and what it says of bad input."""

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, noise_image
from photographs import DESCRIPTIONS, photograph, write_photographs
from PIL import Image
from torch.nn import functional as F
from web import serving

import leanclip
from leanclip.errors import ConfigError, DataError, SampleError, WeightsError
from leanclip.evaluation import Calibration
from leanclip.inference.inputs import to_source
from leanclip.model import CLIP
from leanclip.preprocess.decoding import open_image
from leanclip.preprocess.images import Preprocess
from leanclip.weights import fingerprint, save_weights

TEXTS = list(DESCRIPTIONS.values())


def save_tiny(folder: Path, **changes: object) -> Path:
    """A folder of weights of the tiny model."""
    torch.manual_seed(1)
    model = CLIP(**TINY | changes)
    folder.mkdir(parents=True)
    preprocess = Preprocess(model.config.image_resolution)
    save_weights(folder, model.state_dict(), model.config, preprocess, provenance="a test")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The eight photographs."""
    return write_photographs(tmp_path_factory.mktemp("inference") / "photographs")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("inference") / "tiny")


@pytest.fixture(scope="module")
def clip(weights: Path) -> leanclip.InferenceModel:
    return leanclip.load(weights, device="cpu")


def test_features_of_photographs_are_those_of_the_plain_path(
    clip: leanclip.InferenceModel, folder: Path
) -> None:
    paths = [folder / f"{name}.png" for name in DESCRIPTIONS]
    with torch.no_grad():  # decode, prepare, encode: each by hand
        pixels = torch.stack([clip.preprocess(Image.open(path)) for path in paths])
        plain = F.normalize(clip.model.encode_image(pixels), dim=-1)
    features = clip.embed_images(paths)
    assert isinstance(features, np.ndarray)
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, plain.numpy())
    assert torch.equal(clip.embed_images(paths, as_torch=True), plain)
    assert torch.equal(clip.encode_image(pixels), clip.model.encode_image(pixels).detach())
    tokens = clip.tokenize(TEXTS)
    assert tokens.shape == (8, 24)
    raw = clip.model.encode_text(tokens).detach()
    assert torch.equal(clip.encode_text(tokens), raw)
    np.testing.assert_allclose(clip.embed_texts(TEXTS), F.normalize(raw, dim=-1), atol=1e-6)


def test_what_an_image_is_given_as_does_not_matter(
    clip: leanclip.InferenceModel, folder: Path
) -> None:
    path = folder / "coffee.png"
    image = photograph("coffee")
    array = np.asarray(image)
    with np.errstate(all="raise"):
        given = [path, str(path), path.read_bytes(), image]
        given += [array, array.astype(np.float64) / 255]
    first, *others = (clip.embed_images(one) for one in given)
    assert first.shape == (1, 16)
    for other in others:
        np.testing.assert_array_equal(first, other)
    horse = np.asarray(photograph("horse"))
    expected = clip.embed_images(folder / "horse.png")
    for mask in (horse, horse > 0, horse[:, :, None]):
        np.testing.assert_array_equal(clip.embed_images(mask), expected)
    grey = (np.arange(65536, dtype=np.uint32).astype(np.uint16)).reshape(256, 256)
    assert open_image(to_source(grey)).getpixel((128, 128)) == (128, 128, 128)


def test_folders_lists_arrays_and_iterators(clip: leanclip.InferenceModel, folder: Path) -> None:
    paths = sorted(folder.glob("*.png"))
    expected = clip.embed_images(paths)
    assert expected.shape == (8, 16)
    np.testing.assert_array_equal(clip.embed_images(folder), expected)
    np.testing.assert_array_equal(clip.embed_images(str(folder)), expected)
    np.testing.assert_array_equal(clip.embed_images(tuple(paths)), expected)
    np.testing.assert_array_equal(clip.embed_images(iter(paths)), expected)
    np.testing.assert_array_equal(clip.embed_images([folder]), expected)
    mixed = [paths[0], Image.open(paths[1]), paths[2].read_bytes(), *map(str, paths[3:])]
    np.testing.assert_array_equal(clip.embed_images(mixed), expected)
    arrays = np.stack([np.asarray(noise_image(i)) for i in range(3)])
    np.testing.assert_array_equal(clip.embed_images(arrays), clip.embed_images(list(arrays)))
    assert clip.embed_images([]).shape == (0, 16)
    assert clip.embed_texts([]).shape == (0, 16)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
def test_a_row_does_not_depend_on_the_batch(
    clip: leanclip.InferenceModel, folder: Path, batch_size: int, workers: int
) -> None:
    paths = sorted(folder.glob("*.png"))
    expected = clip.embed_images(paths)
    order = [3, 0, 7, 7, 1, 2, 6, 5, 3, 4]
    found = clip.embed_images([paths[i] for i in order], batch_size=batch_size, workers=workers)
    np.testing.assert_allclose(found, expected[order], atol=1e-6)
    texts = clip.embed_texts(TEXTS)
    found = clip.embed_texts([TEXTS[i] for i in order], batch_size=batch_size)
    np.testing.assert_allclose(found, texts[order], atol=1e-6)
    np.testing.assert_array_equal(found[2], found[3])


@pytest.mark.parametrize("size", [0, 1, 3, 7])
@pytest.mark.parametrize("texts", [1, 2, 6])
def test_packed_texts_have_the_features_of_padded_ones(
    clip: leanclip.InferenceModel, size: int, texts: int
) -> None:
    tokens = torch.randint(1, 49000, (texts, 24))
    tokens[:, :size] = tokens[0, :size].clone()
    lengths = torch.tensor([24, 9, 9, 10, 2, 13][:texts])
    for row, length in zip(tokens, lengths, strict=True):
        row[length - 1], row[length:] = 49407, 0
    with torch.no_grad():
        expected = clip.model.encode_text(tokens)
        found = clip.model.encode_packed(tokens)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "changes", [{"transformer_causal": False}, {"transformer_pool": "last"}], ids=str
)
def test_towers_that_look_at_padding_get_it(tmp_path: Path, changes: dict) -> None:
    clip = leanclip.load(save_tiny(tmp_path / "tiny", **changes), device="cpu")
    with torch.no_grad():
        expected = F.normalize(clip.model.encode_text(clip.tokenize(TEXTS)), dim=-1)
    np.testing.assert_allclose(clip.embed_texts(TEXTS), expected, atol=1e-6)


def test_prompts_of_one_template_equal_those_encoded_alone(clip: leanclip.InferenceModel) -> None:
    prompts = [f"This is a photo of {text}." for text in TEXTS]
    alone = np.concatenate([clip.embed_texts([prompt]) for prompt in prompts])
    np.testing.assert_allclose(clip.embed_texts(prompts), alone, atol=1e-6)


def test_an_iterator_is_read_only_as_far_as_needed(clip: leanclip.InferenceModel) -> None:
    drawn = 0

    def endless() -> Iterator[Image.Image]:
        nonlocal drawn
        while True:
            drawn += 1
            yield noise_image(drawn)

    batches = clip.image_batches(endless(), batch_size=4)
    assert next(batches).shape == (4, 16)
    batches.close()
    assert drawn <= 16


def test_similarity_has_a_row_for_each_text(clip: leanclip.InferenceModel, folder: Path) -> None:
    paths = sorted(folder.glob("*.png"))
    similarity = clip.similarity(paths, TEXTS[:3])
    assert similarity.shape == (3, 8)
    expected = clip.embed_texts(TEXTS[:3]) @ clip.embed_images(paths).T
    np.testing.assert_array_equal(similarity, expected)
    assert clip.similarity(paths[0], TEXTS[0]).shape == (1, 1)


def test_classify_gives_the_softmax_over_scaled_cosines(
    clip: leanclip.InferenceModel, folder: Path, tmp_path: Path
) -> None:
    labels, path = ["cat", "cup of coffee", "rocket"], folder / "rocket.png"
    prompts = [f"a photo of a {label}." for label in labels]
    cosines = (clip.embed_texts(prompts) @ clip.embed_images(path).T)[:, 0]
    scaled = np.exp(np.exp(clip.model.logit_scale.item()) * cosines)
    order = np.argsort(-cosines)
    predictions = clip.classify(path, labels)
    assert [prediction.label for prediction in predictions] == [labels[i] for i in order]
    np.testing.assert_allclose(
        [prediction.probability for prediction in predictions],
        (scaled / scaled.sum())[order],
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        [prediction.similarity for prediction in predictions], cosines[order], atol=1e-6
    )
    assert clip.classify(path, labels, top=1) == predictions[:1]
    twice = clip.classify([path, path], labels)
    assert len(twice) == 2
    for found in twice:
        assert [prediction.label for prediction in found] == [
            prediction.label for prediction in predictions
        ]
        for a, b in zip(found, predictions, strict=True):
            assert a[1:] == pytest.approx(b[1:], abs=1e-5)
    assert len(clip.classify(folder, labels)) == 8
    (tmp_path / "labels.txt").write_text("cat\ncup of coffee\nrocket\n")
    assert clip.classify(path, tmp_path / "labels.txt") == predictions
    assert clip.classify(path, str(tmp_path / "labels.txt")) == predictions


def test_a_classifier_is_made_once_and_averages_templates(
    clip: leanclip.InferenceModel, folder: Path
) -> None:
    labels, templates = ["cat", "dog"], ["a {}", "{} on a table"]
    classifier = clip.classifier(labels, templates)
    for row, label in zip(classifier.weights, labels, strict=True):
        both = clip.embed_texts([t.replace("{}", label) for t in templates], as_torch=True)
        torch.testing.assert_close(row, F.normalize(both.mean(dim=0), dim=0))
    path = folder / "chelsea.png"
    assert clip.classify(path, classifier) == clip.classify(path, labels, templates)
    bare = clip.classifier(labels, "{}")
    np.testing.assert_allclose(bare.weights, clip.embed_texts(labels), atol=1e-6)


def test_a_calibration_sets_the_temperature_and_says_none_of_these(
    clip: leanclip.InferenceModel, folder: Path, tmp_path: Path
) -> None:
    labels, templates = ("cat", "dog", "fox"), ("a {}",)
    paths = sorted(folder.glob("*.png"))
    plain = clip.classify(paths, labels, templates)
    highest = [
        clip.logit_scale * max(prediction.similarity for prediction in found) for found in plain
    ]
    calibration = Calibration(
        temperature=2.0,
        threshold=0.5,
        floor=float(np.median(highest)),
        coverage=0.9,
        images=100,
        weights=fingerprint(clip.model.state_dict()),
        classes=labels,
        templates=templates,
    )
    calibration.save(tmp_path)
    found = clip.classify(paths, labels, templates, calibration=tmp_path)
    assert [bool(one) for one in found] == [h >= calibration.floor for h in highest]
    assert 0 < sum(map(bool, found)) < 8
    for with_it, without in zip(found, plain, strict=True):
        if with_it:
            chances = np.array([prediction.probability for prediction in without]) ** 0.5
            assert [prediction.probability for prediction in with_it] == pytest.approx(
                chances / chances.sum(), abs=1e-5
            )
    classifier = clip.classifier(labels, templates, calibration=calibration)
    assert clip.classify(paths, classifier) == found
    with pytest.raises(ConfigError, match="fitted to other classes"):
        clip.classifier(("cat", "dog"), templates, calibration=calibration)


def test_ten_thousand_labels(clip: leanclip.InferenceModel, folder: Path) -> None:
    labels = [f"thing {i}" for i in range(10_000)]
    predictions = clip.classify(folder / "page.png", labels, top=5)
    assert len(predictions) == 5
    everything = clip.classify(folder / "page.png", labels)
    assert sum(prediction.probability for prediction in everything) == pytest.approx(1, abs=1e-4)


def test_rank_both_ways(clip: leanclip.InferenceModel, folder: Path) -> None:
    paths = sorted(folder.glob("*.png"))
    similarity = clip.similarity(paths, TEXTS)
    images = clip.rank(paths, TEXTS[2])
    assert [one.index for one in images] == list(np.argsort(-similarity[2]))
    assert [one.item for one in images] == [paths[one.index] for one in images]
    assert images[0].similarity == pytest.approx(similarity[2].max(), abs=1e-6)
    assert clip.rank(folder, TEXTS[2], top=3) == images[:3]
    texts = clip.rank(paths[5], TEXTS)
    assert [one.item for one in texts] == [TEXTS[i] for i in np.argsort(-similarity[:, 5])]
    for wrong in ((paths, TEXTS), (paths[0], TEXTS[0])):
        with pytest.raises(ConfigError, match=r"one text .* and several images"):
            clip.rank(*wrong)


def test_a_url_is_fetched_up_to_a_size(
    clip: leanclip.InferenceModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "camera.png").write_bytes((folder / "camera.png").read_bytes())
    (tmp_path / "page.png").write_text("<html>")
    with serving(tmp_path) as server:
        url = f"{server.url}/camera.png"
        expected = clip.embed_images([folder / "camera.png"])
        np.testing.assert_array_equal(clip.embed_images(url), expected)
        for other, words in {
            f"{server.url}/none.png": r"image 1: http.*/none\.png: cannot be fetched: .*404",
            f"{server.url}/page.png": r"^http.*/page\.png: cannot be read as an image: it is none",
            "ftp://127.0.0.1/a.png": r"image 1: ftp.*: is not an http or https address",
        }.items():
            with pytest.raises(DataError, match=words):
                clip.embed_images([url, other])
        monkeypatch.setattr("leanclip.inference.inputs.MAX_URL_BYTES", 1000)
        with pytest.raises(DataError, match="over the limit of 1000 bytes"):
            clip.embed_images(url)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ("nothing.jpg", "nothing.jpg: no such image"),
        (["chelsea.png", "chelsea.txt"], "chelsea.txt: cannot be read as an image: it is none of"),
        ([b"", b""], "image 0: <bytes>: cannot be read as an image: it is empty"),
        (["chelsea.png", 5], "image 1: found an int; give a path, a folder, a URL, bytes"),
        (["chelsea.png", None], "image 1: found None"),
        (5, "images: found an int"),
        (None, "images: found None"),
        (torch.zeros(1, 3, 32, 32), "images: found a Tensor; .* use encode_image"),
        (np.zeros((3, 32, 32), np.uint8), r"image 0: an array of shape \(3, 32, 32\)"),
        (np.full((8, 8, 3), 200.0), r"image 0: an array of float64 outside \[0, 1\]"),
        (np.zeros((8, 8, 3), np.int64), "image 0: an array of int64"),
        ("empty", "empty: no images found"),
    ],
)
def test_what_is_no_image_is_named(
    clip: leanclip.InferenceModel, folder: Path, monkeypatch: pytest.MonkeyPatch, images, words: str
) -> None:
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir(exist_ok=True)
    with pytest.raises(DataError, match=words):
        clip.embed_images(images)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([], "found 0; give two or more"),
        (["cat"], "found 1; give two or more .* `similarity`"),
        (["cat", " "], "label 1 is empty"),
        (["cat", "cat "], "found 1; give two or more"),
        (["cat", 3], "label 1 is of type int; give strings"),
        ("cat, dog", "labels: cat, dog: no such file; give a list, or a file"),
        (["cat", "word " * 50], "a caption of 57 tokens exceeds the context length of 24"),
    ],
)
def test_labels_that_cannot_be_used(
    clip: leanclip.InferenceModel, folder: Path, labels, words
) -> None:
    with pytest.raises(DataError, match=words):
        clip.classify(folder / "page.png", labels)


def test_a_label_of_two_classes_is_both(
    clip: leanclip.InferenceModel, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = clip.classify(folder / "page.png", ["crane", "dog", "crane "])
    assert [prediction.label for prediction in found].count("crane") == 2
    assert sum(prediction.probability for prediction in found) == pytest.approx(1)
    assert caplog.messages == ["labels: 'crane' occurs 2 times; its probability is split"]


def test_other_mistakes_have_their_words(
    clip: leanclip.InferenceModel, weights: Path, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"context length of 24: 'word .*truncate=True"):
        clip.embed_texts(["short", "word " * 50])
    assert clip.embed_texts(["word " * 50], truncate=True).shape == (1, 16)
    with pytest.raises(DataError, match="text 1 is of type PosixPath"):
        clip.embed_texts(["a", tmp_path])  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match=r"'a photo' has no \{\} for the name"):
        clip.classify(folder / "page.png", ["a", "b"], "a photo")
    with pytest.raises(ConfigError, match="batch_size: should be 1 or more"):
        clip.embed_images(folder, batch_size=0)
    (tmp_path / "model.safetensors").write_bytes((weights / "model.safetensors").read_bytes())
    with pytest.raises(WeightsError, match=r"no config\.json"):
        leanclip.load(tmp_path)
    with pytest.raises(
        ConfigError, match="dtype: should be one of float32, bfloat16, float16, found int8"
    ):
        leanclip.load(weights, dtype="int8")


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_towers_may_compute_in_less(
    clip: leanclip.InferenceModel, weights: Path, folder: Path, dtype: str | torch.dtype
) -> None:
    small = leanclip.load(weights, device="cpu", dtype=dtype)
    assert small.dtype == torch.bfloat16
    features = small.embed_images(folder)
    assert features.dtype == np.float32
    cosines = (features * clip.embed_images(folder)).sum(axis=1)
    assert cosines.min() > 0.999
    cosines = (small.embed_texts(TEXTS) * clip.embed_texts(TEXTS)).sum(axis=1)
    assert cosines.min() > 0.99


def test_available_names_are_those_that_load_takes() -> None:
    assert "ViT-B/32" in leanclip.available()


def test_decoding_in_threads_leaves_the_warnings_as_they_were(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(open_image, [*folder.glob("*.png")] * 8))
        assert list(warnings.filters) == before


def test_a_bad_image_stops_the_threads(clip: leanclip.InferenceModel, folder: Path) -> None:
    paths = [folder / "page.png"] * 20
    paths[9] = folder / "page.txt"
    with pytest.raises(SampleError, match=r"page\.txt"):
        clip.embed_images(paths, batch_size=2, workers=2)
