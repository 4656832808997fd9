"""Preprocessing of Hugging Face's and open_clip's folders: their pixels, or refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DATA, TINY, configured_tasks, make_model
from PIL import Image
from skimage import data as photographs

import leanclip
from leanclip import CLIP, Preprocess, WeightsError
from leanclip.api import evaluate_only, train
from leanclip.cli.evaluation_config import evaluation_config
from leanclip.config.schema import Config
from leanclip.config.sections import parse
from leanclip.data import open_dataset
from leanclip.data.loader import evaluation_batches
from leanclip.evaluation import evaluate
from leanclip.evaluation.compare import compare
from leanclip.inference.export import export
from leanclip.preprocess.images import evaluation_pixels
from leanclip.preprocess.text import Tokenizer
from leanclip.training.plan import make_plan
from leanclip.training.stored import model_preprocess
from leanclip.weights import Weights, read_weights, write_weights
from leanclip.weights.processor import read_processor

R = 32
SQUARE = {"height": R, "width": R}
CLIP_LIKE = {"size": {"shortest_edge": R}, "crop_size": SQUARE}
SQUASH = {"size": SQUARE, "do_center_crop": False}


def pictures() -> list[Image.Image]:
    """Odd and even differences to the crop, both ways round, and one smaller than the crop."""
    photo = Image.fromarray(photographs.coffee())
    sizes = ((300, 200), (201, 333), (97, 96), (40, 67), (32, 32), (25, 19))
    return [photo.crop((50, 40, 50 + w, 40 + h)) for w, h in sizes]


def kind(name: str, **fields: object) -> dict[str, Any]:
    return {"image_processor_type": name, **fields}


HONOURED: dict[str, dict[str, Any]] = {
    "clip": CLIP_LIKE,
    "older names": {"size": R, "crop_size": R, "feature_extractor_type": "CLIPFeatureExtractor"},
    "fast": kind("CLIPImageProcessorFast", **CLIP_LIKE),
    "pil": kind("CLIPImageProcessorPil", **CLIP_LIKE),
    "crop as a list": {"size": R, "crop_size": [R, R]},
    "resize to more than the crop": {"size": {"shortest_edge": 37}, "crop_size": SQUARE},
    "resize to less than the crop": {"size": {"shortest_edge": 21}, "crop_size": SQUARE},
    "resize to a little less": {"size": {"shortest_edge": 31}, "crop_size": R},
    "squash": SQUASH,
    "squash, size as a list": {"size": [R, R], "do_center_crop": False},
    "squash, then crop": {"size": {"height": 45, "width": 38}, "crop_size": SQUARE},
    "squash, then pad": {"size": {"height": 27, "width": 20}, "crop_size": SQUARE},
    "int size with default_to_square": {"size": R, "default_to_square": True, "crop_size": R},
    "no resize": {"do_resize": False, "crop_size": SQUARE},
    "no rescale": CLIP_LIKE | {"do_rescale": False},
    "no normalize": CLIP_LIKE | {"do_normalize": False},
    "neither": CLIP_LIKE | {"do_rescale": False, "do_normalize": False},
    "rescale to [-1, 1]": CLIP_LIKE
    | {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    "rescale without normalize": CLIP_LIKE | {"rescale_factor": 0.01, "do_normalize": False},
    "scalar mean and std": CLIP_LIKE | {"image_mean": 0.4, "image_std": 0.25},
    "mean alone": CLIP_LIKE | {"image_mean": [0.5, 0.4, 0.3]},
    "nulls": CLIP_LIKE | {"do_convert_rgb": None, "do_pad": None, "data_format": None},
    "null for false": CLIP_LIKE | {"do_resize": None, "do_rescale": None},
    "not to rgb": CLIP_LIKE | {"do_convert_rgb": False},
    "nearest": CLIP_LIKE | {"resample": 0},
    "lanczos": CLIP_LIKE | {"resample": 1},
    "bilinear": CLIP_LIKE | {"resample": 2},
    "box": SQUASH | {"resample": 4},
    "hamming": SQUASH | {"resample": 5},
    "unused crop": SQUASH | {"crop_size": {"height": 224, "width": 224}},
    "ChineseCLIP": kind("ChineseCLIPImageProcessor", **CLIP_LIKE),
    "Bit": kind("BitImageProcessor", **CLIP_LIKE, resample=2),
    "Siglip": kind("SiglipImageProcessor", size=SQUARE),
    "ViT": kind("ViTImageProcessor", size=SQUARE),
    "ViT, int size": {"feature_extractor_type": "ViTFeatureExtractor", "size": R},
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "shortest edge without a crop": ("do_center_crop", CLIP_LIKE | {"do_center_crop": False}),
    "nothing at all": ("do_resize", {"do_resize": False, "do_center_crop": False}),
    "longest edge": ("size: longest_edge", CLIP_LIKE | {"size": {"longest_edge": R}}),
    "both edges": (
        "size: longest_edge and shortest_edge",
        CLIP_LIKE | {"size": {"shortest_edge": R, "longest_edge": 48}},
    ),
    "a box": ("size: max_height", CLIP_LIKE | {"size": {"max_height": R, "max_width": R}}),
    "a crop that is no square": (
        "crop_size.*square",
        CLIP_LIKE | {"crop_size": {"height": R, "width": 2 * R}},
    ),
    "a size that is no square": (
        "size.*square",
        SQUASH | {"size": {"height": R, "width": 2 * R}},
    ),
    "another crop than the model's": ("crop_size.*224.*32", {"size": {"shortest_edge": R}}),
    "another size than the model's": (
        "size.*48.*32",
        SQUASH | {"size": 48, "default_to_square": 1},
    ),
    "padded to more": ("do_pad", SQUASH | {"do_pad": True, "pad_size": 64}),
    "padded to a square": (
        "do_pad",
        CLIP_LIKE | {"do_center_crop": False, "do_pad": True, "pad_size": SQUARE},
    ),
    "an unknown filter": ("resample", CLIP_LIKE | {"resample": 7}),
    "a filter by name": ("resample", CLIP_LIKE | {"resample": "bicubic"}),
    "no factor": ("rescale_factor", CLIP_LIKE | {"rescale_factor": 0}),
    "no mean": ("image_mean", CLIP_LIKE | {"image_mean": None}),
    "no filter": ("resample", CLIP_LIKE | {"resample": None}),
    "no size": ("size", CLIP_LIKE | {"size": None}),
    "code of its own": ("auto_map", CLIP_LIKE | {"auto_map": {"AutoImageProcessor": "a.B"}}),
    "two means": ("image_mean", CLIP_LIKE | {"image_mean": [0.5, 0.5]}),
    "a std of zero": ("image_std", CLIP_LIKE | {"image_std": [0.5, 0, 0.5]}),
    "channels last": ("data_format", CLIP_LIKE | {"data_format": "channels_last"}),
    "Kosmos-2's square": ("use_square_size", CLIP_LIKE | {"use_square_size": True}),
    "a field of another class": ("crop_pct", CLIP_LIKE | {"crop_pct": 0.9}),
    "a field of no class": ("sharpen", CLIP_LIKE | {"sharpen": 2}),
    "NaFlex": ("image_processor_type: Siglip2ImageProcessor", kind("Siglip2ImageProcessor")),
    "Pixtral": ("image_processor_type: PixtralImageProcessor", kind("PixtralImageProcessor")),
    "one of a repository's own": ("image_processor_type: MyProcessor", kind("MyProcessor")),
    "ConvNext": ("image_processor_type: ConvNextImageProcessor", kind("ConvNextImageProcessor")),
    "a filter's number as text": ("resample", CLIP_LIKE | {"resample": [3]}),
}


def folder_with(
    values: dict[str, Any], folder: Path, name: str = "preprocessor_config.json"
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(values))
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    return folder


def theirs(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")


@pytest.mark.parametrize("name", HONOURED)
def test_pixels_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = folder_with(HONOURED[name], tmp_path)
    processor, ours = theirs(folder), read_processor(folder, R)
    assert type(processor).__name__.endswith("Pil")
    assert ours is not None
    for picture in pictures():
        expected = processor(picture, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(ours(picture), expected.float(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_done_is_refused_by_the_fields_name(name: str, tmp_path: Path) -> None:
    words, values = REFUSED[name]
    with pytest.raises(WeightsError, match=words) as caught:
        read_processor(folder_with(values, tmp_path), R)
    assert "preprocessor_config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_processor_config_wins_where_both_are_there(tmp_path: Path) -> None:
    folder_with(CLIP_LIKE | {"image_mean": 0.1}, tmp_path)
    folder_with(
        {"image_processor": CLIP_LIKE | {"image_mean": 0.2}}, tmp_path, "processor_config.json"
    )
    ours = read_processor(tmp_path, R)
    assert ours is not None
    assert ours.mean == (0.2, 0.2, 0.2)
    folder_with({"processor_class": "CLIPProcessor"}, tmp_path, "processor_config.json")  # older
    ours = read_processor(tmp_path, R)
    assert ours is not None
    assert ours.mean == (0.1, 0.1, 0.1)


def test_the_fields_of_a_saved_processor_are_all_known(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessorPil(**CLIP_LIKE, resample=2, image_mean=[0.3] * 3)
    processor.save_pretrained(tmp_path)
    ours = read_processor(tmp_path, R)
    assert ours == Preprocess(R, (0.3, 0.3, 0.3), interpolation="bilinear", rounding="down")


SEEN = {  # by Preprocess, and by a folder that was written of it
    "squash": Preprocess(R, resize="squash"),
    "squash to more": Preprocess(R, resize="squash", size=(40, 36), rounding="down"),
    "bilinear": Preprocess(R, interpolation="bilinear", mean=(0.5, 0.5, 0.5), rounding="down"),
    "shortest to more": Preprocess(R, size=38, rounding="down"),
    "longest": Preprocess(R, resize="longest", fill=127, interpolation="bilinear"),
    "none": Preprocess(R, resize="none"),
}


def weights_of(preprocess: Preprocess) -> Weights:
    model = CLIP(**TINY)
    return Weights(Path("tiny"), "leanclip", model.state_dict(), model.config, preprocess)


@pytest.mark.parametrize("to", ["leanclip", "hf", "open_clip"])
@pytest.mark.parametrize("name", SEEN)
def test_preprocessing_is_written_or_refused(name: str, to: str, tmp_path: Path) -> None:
    preprocess = SEEN[name]
    impossible = {"hf": ("longest",), "open_clip": ("squash to more", "shortest to more", "none")}
    if name in impossible.get(to, ()):
        with pytest.raises(WeightsError, match=r"resize|fill|size"):
            write_weights(weights_of(preprocess), tmp_path / "w", to)
        assert not (tmp_path / "w").exists()
        return
    write_weights(weights_of(preprocess), tmp_path / "w", to)
    back = read_weights(tmp_path / "w").preprocess
    assert back is not None
    pictures_ = [one for one in pictures() if to == "leanclip" or (one.width - one.height) % 4 == 0]
    for picture in pictures_:
        assert torch.equal(back(picture), preprocess(picture))
    if to == "hf":
        expected = theirs(tmp_path / "w")(pictures()[1], return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(back(pictures()[1]), expected, rtol=2e-6, atol=2e-6)


def test_open_clips_modes() -> None:
    """Against open_clip's transforms, written out."""
    picture = pictures()[1]  # 201 x 333
    resized = picture.resize((19, 32), Image.Resampling.BILINEAR)  # round(201 / (333 / 32))
    canvas = Image.new("RGB", (R, R), (9, 9, 9))
    canvas.paste(resized, (6, 0))  # (32 - 19) // 2 before, 7 behind
    longest = Preprocess(R, resize="longest", interpolation="bilinear", fill=9)
    expected = torch.from_numpy(np.array(canvas)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (longest.mean, longest.std))
    torch.testing.assert_close(longest(picture), (expected - mean) / std, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"resize_mode": "naflex"}, "resize_mode: 'naflex'"),
        ({"interpolation": "nearest"}, "interpolation: 'nearest'"),
        ({"mode": "L"}, "mode: 'L'"),
        ({"fill_color": [1, 2, 3]}, "fill_color"),
        ({"std": [1, 1, 0]}, "std"),
        ({"mean": [1, 1]}, "preprocess_cfg"),
        ({"crop_pct": 0.9}, "crop_pct"),
        (
            {"resize_mode": "longest", "interpolation": "random", "mean": 0.5, "size": 9},
            Preprocess(R, (0.5, 0.5, 0.5), resize="longest"),
        ),
        ({"resize_mode": None, "interpolation": None, "std": None}, Preprocess(R)),
        (None, Preprocess(R)),
    ],
)
def test_open_clips_preprocess_cfg(values: Any, words: object, tmp_path: Path) -> None:
    write_weights(weights_of(Preprocess(R)), tmp_path / "w", "open_clip")
    file = tmp_path / "w" / "open_clip_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"preprocess_cfg": values}))
    if isinstance(words, Preprocess):
        assert read_weights(tmp_path / "w").preprocess == words
        return
    with pytest.raises(WeightsError, match=str(words)) as caught:
        read_weights(tmp_path / "w")
    assert "open_clip_config.json" in str(caught.value)


def golden_photos() -> list[Image.Image]:
    """The images that tests/data's `image` was made of."""
    photos = [Image.fromarray(getattr(photographs, n)()) for n in ("chelsea", "coffee", "rocket")]
    return [*photos, photos[0].crop((40, 20, 90, 290))]


@torch.no_grad()
def test_dfn_gives_open_clips_pixels_and_features() -> None:
    clip = leanclip.load(DATA / "oc-dfn", device="cpu")
    io = {name: torch.from_numpy(array) for name, array in np.load(DATA / "oc-dfn/io.npz").items()}
    photos = golden_photos()
    pixels = torch.stack([clip.preprocess(photo) for photo in photos])
    assert torch.equal(pixels, io["image"])
    for ours, theirs in (
        (clip.model.encode_image(pixels), io["image_features"]),
        (clip.model.encode_text(io["text"]), io["text_features"]),
        (clip.embed_images(photos, as_torch=True), F.normalize(io["image_features"], dim=-1)),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_squashing_folder_gives_transformers_pixels() -> None:
    preprocess = read_processor(DATA / "hf-clip-squash", 64)
    assert preprocess is not None
    pixels = torch.stack([preprocess(photo) for photo in golden_photos()])
    assert torch.equal(pixels, torch.from_numpy(np.load(DATA / "hf-clip-squash/io.npz")["image"]))


def test_values_out_of_range_are_refused() -> None:
    wrong: tuple[dict[str, Any], ...] = (
        {"resize": "stretch"},
        {"interpolation": "cubic"},
        {"rounding": "up"},
        {"size": (32, 32)},
        {"size": 0},
        {"fill": 256},
        {"resolution": 0},
    )
    for changes in wrong:
        with pytest.raises(ValueError, match=next(iter(changes))):
            Preprocess(**changes)


@pytest.fixture(scope="module")
def squashing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "hf"
    preprocess = Preprocess(R, resize="squash", size=(40, 36), interpolation="bilinear")
    write_weights(weights_of(preprocess), folder, "hf")
    return folder


def config_of(folder: Path, root: Path, **data: object) -> dict[str, Any]:
    return {
        "model": TINY,
        "data": {"format": "folder", "root": str(root), "workers": 0, "augment": False} | data,
        "train": {"epochs": 1, "batch_size": 2},
        "output_dir": str(folder),
    }


def photo_classes(root: Path) -> Path:
    for label in ("cat", "dog"):
        (root / label).mkdir(parents=True)
        for i, picture in enumerate(pictures()[:3]):
            picture.transpose(Image.Transpose(i + (label == "dog"))).save(root / label / f"{i}.png")
    return root


def test_training_evaluation_and_export_go_on_with_the_preprocessing(
    squashing: Path, tmp_path: Path
) -> None:
    root = photo_classes(tmp_path / "data")
    loaded = read_weights(squashing).preprocess
    assert loaded is not None
    settings = parse(Config, config_of(tmp_path / "run", root) | {"load": str(squashing)}, where="")
    plan = make_plan(settings, torch.device("cpu"))
    assert plan.preprocess == loaded
    outcome = train(plan)
    assert outcome is not None
    clip = leanclip.load(tmp_path / "run", device="cpu")
    assert clip.preprocess == loaded
    # The run goes on as it was, though the weights it began with are gone.
    moved = settings.model_copy(update={"load": str(tmp_path / "gone")})
    assert model_preprocess(moved) == loaded
    # What evaluation measures are the features of these pixels.
    wanted = evaluation_config(str(tmp_path / "run"), f"folder:{root}", "zeroshot")
    assert model_preprocess(wanted) == loaded
    (batch,) = evaluation_batches(
        open_dataset(settings.data),
        settings.data,
        preprocess=loaded,
        tokenizer=Tokenizer(24),
        batch_size=9,
    )
    first = Image.open(root / "cat" / "0.png")
    pixels = torch.from_numpy(evaluation_pixels(first, loaded))
    assert torch.equal(batch.images[0], pixels)
    assert not torch.equal(pixels, torch.from_numpy(evaluation_pixels(first, Preprocess(R))))
    facts = export(clip, tmp_path / "exported", "torch")
    assert "resize to 36 x 40" in facts["preprocess"]["steps"]
    exported = leanclip.load(tmp_path / "exported", backend="torch")
    assert exported.preprocess == loaded
    np.testing.assert_allclose(exported.embed_images(first), clip.embed_images(first), atol=1e-5)


def test_settings_of_the_data_win_over_the_weights(squashing: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"resize": "longest", "interpolation": "lanczos"}
    values: dict[str, Any] = config_of(tmp_path / "run", tmp_path, **changes)
    values["load"] = str(squashing)
    found = model_preprocess(parse(Config, values, where=""))
    assert found == Preprocess(R, resize="longest", interpolation="lanczos")
    values["model"] = TINY | {"image_resolution": 64}
    values["data"] = values["data"] | dict.fromkeys(changes)
    found = model_preprocess(parse(Config, values, where=""))
    assert (found.resolution, found.size, found.resize) == (64, (80, 72), "squash")


def test_weights_measured_with_a_runs_settings_have_their_own_preprocessing(
    squashing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = photo_classes(tmp_path / "data")
    values = config_of(tmp_path / "run", root) | {"evaluate": {"zero_shot": {}}}
    loading = parse(Config, values | {"load": str(squashing)}, where="")
    make_model(tmp_path / "run/checkpoints/step-00000001")
    seen = []

    def see(_model: CLIP, _tasks: object, preprocess: Preprocess, **_: object) -> None:
        seen.append(preprocess)
        raise WeightsError("enough")

    monkeypatch.setattr("leanclip.api.evaluate", see)
    for source in (str(squashing), None):
        with pytest.raises(WeightsError, match="enough"):
            evaluate_only(loading, torch.device("cpu"), source)
    assert seen == [read_weights(squashing).preprocess, Preprocess(R)]


def test_another_resolution_by_arch_moves_the_preprocessing_with_it(squashing: Path) -> None:
    found = read_weights(squashing, arch=TINY | {"image_resolution": 64}).preprocess
    assert found is not None
    assert (found.resolution, found.size) == (64, (80, 72))


def test_formats_without_a_place_for_it_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wide = TINY | {"vision_width": 64, "transformer_width": 64}
    wide |= {"vision_heads": 1, "transformer_heads": 1}
    model = CLIP(**wide)
    preprocess = Preprocess(R, resize="squash")
    weights = Weights(Path("tiny"), "leanclip", model.state_dict(), model.config, preprocess)
    write_weights(weights, tmp_path / "w.pt", "openai")
    assert "do not store the preprocessing" in caplog.text
    assert "squash" in caplog.text


def test_compared_models_keep_their_own_preprocessing(squashing: Path, tmp_path: Path) -> None:
    config = evaluation_config(str(squashing), f"folder:{photo_classes(tmp_path)}", "zeroshot")
    tasks = configured_tasks(config)
    clip = leanclip.load(squashing, device="cpu")
    both = (clip.preprocess, Preprocess(R))
    found = compare((clip.model, both[0]), (clip.model, both[1]), ("a", "b"), tasks)
    for report, preprocess in zip(found.reports, both, strict=True):
        alone = evaluate(clip.model, tasks, preprocess)
        ours, theirs = (one.results["zero_shot"].features for one in (report, alone))
        assert torch.equal(ours, theirs)
