"""Hugging Face's families against transformers: features, round trips, tokenisers, processors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROJECT
from PIL import Image
from safetensors.torch import load_file
from skimage import data as photographs

import leanclip
from leanclip import CLIP, WeightsError
from leanclip.config.sections import to_plain
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.patches import Patches
from leanclip.weights import Weights, load_into, read_weights, write_weights

MODERN = PROJECT / "tests" / "data" / "modern"
GOLDEN = sorted(folder.name for folder in MODERN.glob("hf-*"))
CLASSES = {
    "clip": "CLIP",
    "metaclip_2": "MetaClip2",
    "siglip": "Siglip",
    "siglip2": "Siglip2",
    "chinese_clip": "ChineseCLIP",
}


def transformers() -> Any:
    return pytest.importorskip("transformers")


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def difference(ours: torch.Tensor, theirs: Any) -> float:
    """The largest relative difference of rows."""
    theirs = torch.as_tensor(theirs)
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())


def loaded(folder: Path) -> tuple[Weights, CLIP]:
    weights = read_weights(folder)
    assert weights.model is not None
    model = CLIP(**to_plain(weights.model)).eval()
    load_into(model, weights)
    return weights, model


def logits(model: CLIP, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    bias = 0 if model.logit_bias is None else model.logit_bias
    return unit(image) @ unit(text).T * model.logit_scale.exp() + bias


def photos() -> list[Image.Image]:
    cat, coffee, rocket = (
        Image.fromarray(getattr(photographs, name)()) for name in ("chelsea", "coffee", "rocket")
    )
    return [cat, coffee, rocket, cat.crop((40, 20, 90, 290))]


def saved(folder: Path, kind: str, vision: dict[str, Any], text: dict[str, Any], **top: Any) -> Any:
    """A random model of transformers' in a folder."""
    known = transformers()
    config = getattr(known, f"{CLASSES[kind]}Config")(vision_config=vision, text_config=text, **top)
    torch.manual_seed(3)
    model = getattr(known, f"{CLASSES[kind]}Model")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def write_words(folder: Path, *, end: int = 98, pad: int = 1) -> None:
    """A tokeniser of the words w0 to w98, each with its number as id."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(99)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A w{end}", special_tokens=[(f"w{end}", end)]
    )
    made.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": f"w{pad}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind | {"eos_token": f"w{end}"}))


def outputs_of(model: Any, pixels: torch.Tensor | Patches, tokens: torch.Tensor) -> Any:
    """What transformers' model computes of the same inputs as ours."""
    inputs: dict[str, Any] = {"input_ids": tokens}
    if isinstance(pixels, Patches):
        inputs |= {"pixel_values": pixels.values, "spatial_shapes": pixels.shapes}
        inputs["pixel_attention_mask"] = pixels.mask.long()
    else:
        inputs["pixel_values"] = pixels
    if model.config.model_type == "chinese_clip":
        inputs["attention_mask"] = (tokens != 0).long()
    return model(**inputs)


# --- golden folders


@torch.no_grad()
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_folders(name: str) -> None:
    known = np.load(MODERN / name / "io.npz")
    weights, model = loaded(MODERN / name)
    assert weights.preprocess is not None
    if weights.preprocess.resize == "naflex":
        shapes = torch.from_numpy(known["spatial_shapes"]).long()
        pixels: Any = Patches(torch.from_numpy(known["pixel_values"]), shapes)
        assert np.array_equal(pixels.mask, known["pixel_attention_mask"] > 0)
    else:
        pixels = torch.stack([weights.preprocess(photo) for photo in photos()])
        assert np.array_equal(pixels, known["image"])
    image = model.encode_image(pixels)
    text = model.encode_text(torch.from_numpy(known["text"]).long())
    assert difference(unit(image), unit(torch.from_numpy(known["image_features"]))) < 1e-5
    assert difference(unit(text), unit(torch.from_numpy(known["text_features"]))) < 1e-5
    assert difference(logits(model, image, text), known["logits_per_image"]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_folders_there_and_back(name: str, tmp_path: Path) -> None:
    auto = transformers().AutoModel
    weights = read_weights(MODERN / name)
    write_weights(weights, tmp_path / "native", "leanclip")
    write_weights(read_weights(tmp_path / "native"), tmp_path / "w", "hf")
    before = load_file(MODERN / name / "model.safetensors")
    after = load_file(tmp_path / "w" / "model.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.shape == after[key].shape
        assert torch.equal(tensor, after[key]), key
    again = read_weights(tmp_path / "w")
    assert again.model == weights.model
    assert again.preprocess == weights.preprocess
    first, second = (auto.from_pretrained(f).eval() for f in (MODERN / name, tmp_path / "w"))
    assert type(first) is type(second)
    known = np.load(MODERN / name / "io.npz")
    if "spatial_shapes" in known:
        shapes = torch.from_numpy(known["spatial_shapes"]).long()
        pixels: Any = Patches(torch.from_numpy(known["pixel_values"]), shapes)
    else:
        pixels = torch.from_numpy(known["image"])
    tokens = torch.from_numpy(known["text"]).long()
    one, two = (outputs_of(model, pixels, tokens) for model in (first, second))
    assert torch.equal(one.logits_per_image, two.logits_per_image)


@pytest.mark.parametrize("name", GOLDEN)
def test_processors_that_are_written_give_the_same_pixels(name: str, tmp_path: Path) -> None:
    auto = transformers().AutoImageProcessor
    write_weights(read_weights(MODERN / name), tmp_path / "w", "hf")
    first, second = (
        auto.from_pretrained(folder, backend="pil")(photos(), return_tensors="pt")
        for folder in (MODERN / name, tmp_path / "w")
    )
    assert first.keys() == second.keys()
    for key, values in first.items():
        assert torch.equal(torch.as_tensor(values), torch.as_tensor(second[key]))


@torch.no_grad()
@pytest.mark.parametrize("name", ["hf-siglip", "hf-siglip2", "hf-siglip2-naflex"])
def test_tokenisers_that_are_written_mask_no_padding(name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in (MODERN / name).iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "tokenizer_config.json").read_text())
    config.pop("model_input_names", None)  # the class's then: with a mask
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    write_weights(read_weights(source), tmp_path / "w", "hf")
    tokens = transformers().AutoTokenizer.from_pretrained(tmp_path / "w")
    model = transformers().AutoModel.from_pretrained(tmp_path / "w").eval()
    inputs = tokens(["a cat"], padding="max_length", return_tensors="pt")
    assert inputs.keys() == {"input_ids"}
    words = unit(model.text_model(**inputs).pooler_output)
    ours = leanclip.load(source, device="cpu").embed_texts("a cat", as_torch=True)
    assert difference(ours, words) < 1e-5


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_texts_and_photographs_through_load(name: str, tmp_path: Path) -> None:
    write_weights(read_weights(MODERN / name), tmp_path / "w", "hf")
    lines = (MODERN / name / "tokens.jsonl").read_text().splitlines()
    known = [json.loads(line) for line in lines]
    texts, ids = ([one[key] for one in known] for key in ("text", "ids"))
    outputs = np.load(MODERN / name / "io.npz")
    images, words = (torch.from_numpy(outputs[f"{key}_features"]) for key in ("image", "text"))
    for folder in (MODERN / name, tmp_path / "w"):
        clip = leanclip.load(folder, device="cpu")
        assert clip.model.tokenizer(texts, truncate=True).tolist() == ids
        count = len(words)
        assert np.array_equal(outputs["text"], ids[:count])
        ours = clip.embed_texts(texts[:count], truncate=True, as_torch=True)
        assert difference(ours, unit(words)) < 1e-5
        if "image" in outputs:
            assert difference(clip.embed_images(photos(), as_torch=True), unit(images)) < 1e-5
    options = {"padding": "max_length", "truncation": True, "max_length": len(ids[0])}
    theirs = transformers().AutoTokenizer.from_pretrained(tmp_path / "w")
    assert theirs(texts, **options)["input_ids"] == ids


# --- random models of other shapes

TEXT: dict[str, Any] = {
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "max_position_embeddings": 11,
}
VISION: dict[str, Any] = {
    "hidden_size": 30,
    "intermediate_size": 77,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,  # 15 wide
    "image_size": 29,  # 4 x 4 patches, one pixel is left
    "patch_size": 7,
}
FLEX = {name: value for name, value in VISION.items() if name != "image_size"}
ODD = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 3e-4}
EOS = {"eos_token_id": 5}
SHAPES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "clip": ("clip", VISION, TEXT, {"projection_dim": 13}),
    "clip, an end token": ("clip", VISION, TEXT | EOS, {"projection_dim": 13}),
    "clip, eos 2": ("clip", VISION, TEXT | {"eos_token_id": 2}, {}),
    "clip, two activations": ("clip", VISION | ODD, TEXT | {"hidden_act": "gelu"}, {}),
    "metaclip 2": ("metaclip_2", VISION | ODD, TEXT | {"eos_token_id": 2}, {"projection_dim": 7}),
    "metaclip 2, the last id": ("metaclip_2", VISION, TEXT | {"eos_token_id": 98}, {}),
    "siglip": ("siglip", VISION, TEXT | {"projection_size": 30}, {}),
    "siglip, two activations": (
        *("siglip", VISION | {"hidden_act": "gelu"}),
        *(TEXT | ODD | {"hidden_size": 20, "projection_size": 30}, {}),
    ),
    "naflex": ("siglip2", FLEX | {"num_patches": 9}, TEXT | {"projection_size": 30}, {}),
    "naflex, two activations": (
        *("siglip2", FLEX | {"num_patches": 16, "hidden_act": "quick_gelu"}),
        *(TEXT | {"hidden_size": 30, "num_attention_heads": 5}, {}),
    ),
    "chinese": ("chinese_clip", VISION, TEXT | {"type_vocab_size": 3}, {"projection_dim": 13}),
    "chinese, many positions": (
        *("chinese_clip", VISION | ODD, TEXT | {"max_position_embeddings": 60}),
        {"projection_dim": 13},
    ),
}


def inputs_for(kind: str, text: dict[str, Any]) -> tuple[torch.Tensor | Patches, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    if kind == "siglip2":
        values = torch.randn(3, 20, 147, generator=generator)
        pixels: Any = Patches(values, torch.tensor([[2, 7], [4, 5], [1, 20]]))
    else:
        pixels = torch.randn(3, 3, 29, 29, generator=generator)
    length = min(11, text["max_position_embeddings"])
    tokens = torch.randint(6, 98, (4, length), generator=generator)
    end = text.get("eos_token_id", 98)
    tokens[0, 3] = tokens[1, 7] = tokens[2, length - 1] = tokens[3, 1] = 98 if end == 2 else end
    if kind == "metaclip_2":
        tokens[0, 3] = tokens[1, 7] = tokens[2, length - 1] = tokens[3, 1] = end
    tokens[0, 5:] = tokens[3, 2:] = 0 if kind == "chinese_clip" else 1
    return pixels, tokens


@torch.no_grad()
@pytest.mark.parametrize("name", SHAPES)
def test_random_models_of_other_shapes(name: str, tmp_path: Path) -> None:
    kind, vision, text, top = SHAPES[name]
    theirs = saved(tmp_path / "w", kind, vision, text, **top)
    if kind != "clip":
        pad = 0 if kind == "chinese_clip" else 1
        write_words(tmp_path / "w", end=text.get("eos_token_id", 98), pad=pad)
    weights, model = loaded(tmp_path / "w")
    pixels, tokens = inputs_for(kind, text)
    expected = outputs_of(theirs, pixels, tokens)
    image, words = model.encode_image(pixels), model.encode_text(tokens)
    assert difference(unit(image), expected.image_embeds) < 1e-5
    assert difference(unit(words), expected.text_embeds) < 1e-5
    assert difference(logits(model, image, words), expected.logits_per_image) < 2e-5
    write_weights(weights, tmp_path / "again", "hf")
    again = read_weights(tmp_path / "again")
    assert again.model == weights.model
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("w", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    second = transformers().AutoModel.from_pretrained(tmp_path / "again").eval()
    assert type(second) is type(theirs)
    same = outputs_of(second, pixels, tokens)
    assert torch.equal(same.logits_per_image, expected.logits_per_image)


# --- tokenisers that are not the family's


@torch.no_grad()
def test_another_tokeniser_of_clip_model(tmp_path: Path) -> None:
    theirs = saved(tmp_path / "w", "clip", VISION, TEXT | EOS)
    write_words(tmp_path / "w", end=5)
    write_weights(read_weights(tmp_path / "w"), tmp_path / "again", "hf")
    tokens = torch.tensor([[7, 9, 5, *[1] * 8]])
    expected = unit(outputs_of(theirs, inputs_for("clip", TEXT)[0], tokens).text_embeds)
    for name in ("w", "again"):
        clip = leanclip.load(tmp_path / name, device="cpu")
        assert torch.equal(clip.model.tokenizer("w7 w9"), tokens)
        assert clip.model.config.transformer_pad_id == 1
        assert difference(clip.embed_texts("w7 w9", as_torch=True), expected) < 1e-5
    write_words(tmp_path / "w", end=6)
    with pytest.raises(WeightsError, match="read at the token 5, its tokeniser ends them with 6"):
        read_weights(tmp_path / "w")


@torch.no_grad()
def test_clips_tokeniser_in_siglip_model_pads_as_ours(tmp_path: Path) -> None:
    config = read_weights(MODERN / "hf-siglip").model
    assert config is not None
    model = CLIP(**to_plain(config) | {"vocab_size": 49408, "transformer_pad_id": 0}).eval()
    size = Preprocess(config.image_resolution, resize="squash", rounding="down")
    own = Weights(Path("own"), "leanclip", model.state_dict(), model.config, size)
    write_weights(own, tmp_path / "w", "hf")
    again = read_weights(tmp_path / "w")
    assert (again.model, again.tokenizer) == (model.config, None)
    known = transformers()
    texts = ["a cat", "two dogs on a sofa"]
    options = {"padding": "max_length", "max_length": 16, "return_tensors": "pt"}
    tokens = known.AutoTokenizer.from_pretrained(tmp_path / "w")(texts, **options)["input_ids"]
    assert torch.equal(tokens, model.tokenizer(texts))
    theirs = known.AutoModel.from_pretrained(tmp_path / "w").eval()
    features = theirs.get_text_features(input_ids=tokens).pooler_output
    assert difference(model.encode_text(tokens), features) < 1e-5


def test_a_folder_without_a_tokeniser_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "w", "siglip", VISION, TEXT | {"projection_size": 30})
    with pytest.raises(WeightsError, match=r"none of the files of a tokeniser: tokenizer\.json"):
        read_weights(tmp_path / "w")


# --- processors that are not the family's

OTHER_PROCESSORS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "no class": ("hf-siglip", {"size": {"height": 62, "width": 62}}, None),
    "clip's crop": (
        "hf-siglip",
        {
            "image_processor_type": "CLIPImageProcessor",
            **{"size": {"shortest_edge": 62}, "crop_size": {"height": 62, "width": 62}},
        },
        None,
    ),
    "chinese, no class": (
        "hf-chinese-clip",
        {"size": {"shortest_edge": 50}, "crop_size": {"height": 48, "width": 48}, "resample": 2},
        None,
    ),
    "vit's": (
        *("hf-siglip", {"image_processor_type": "ViTImageProcessor", "size": {"height": 62}}),
        "size",
    ),
    "naflex": (
        *("hf-siglip", {"image_processor_type": "Siglip2ImageProcessor"}),
        "Siglip2ImageProcessor makes patches, the model takes squares",
    ),
    "squares": (
        *("hf-siglip2-naflex", {"image_processor_type": "SiglipImageProcessor"}),
        "SiglipImageProcessor makes squares, the model takes patches",
    ),
    "other patches": (
        *("hf-siglip2-naflex", {"image_processor_type": "Siglip2ImageProcessor"}),
        "patch_size: 16, the model takes patches of 8",
    ),
    "no patches": (
        "hf-siglip2-naflex",
        {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 8, "max_num_patches": 0},
        "max_num_patches: 0",
    ),
    "no resize": (
        "hf-siglip2-naflex",
        {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 8, "do_resize": False},
        "do_resize: false is not supported with patches",
    ),
    "blip's": (
        *("hf-siglip", {"image_processor_type": "BlipImageProcessor"}),
        "BlipImageProcessor is not supported",
    ),
    "another side": (
        *("hf-siglip2", {"image_processor_type": "SiglipImageProcessor"}),
        "size: makes images of 224 pixels a side, the model takes 48",
    ),
}


@pytest.mark.parametrize("name", OTHER_PROCESSORS)
def test_processors_of_another_family(name: str, tmp_path: Path) -> None:
    source, values, words = OTHER_PROCESSORS[name]
    for file in (MODERN / source).iterdir():
        if file.suffix != ".npz":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    if words is not None:
        with pytest.raises(WeightsError, match=rf"preprocessor_config\.json: .*{words}"):
            read_weights(tmp_path)
        return
    preprocess = read_weights(tmp_path).preprocess
    write_weights(read_weights(tmp_path), tmp_path / "again", "hf")
    assert preprocess == read_weights(tmp_path / "again").preprocess
    auto = transformers().AutoImageProcessor
    first, second = (
        auto.from_pretrained(folder, backend="pil")(photos(), return_tensors="pt")["pixel_values"]
        for folder in (tmp_path, tmp_path / "again")
    )
    assert preprocess is not None
    ours = torch.stack([preprocess(photo) for photo in photos()])
    assert torch.equal(first, second)
    assert torch.equal(first, ours)
