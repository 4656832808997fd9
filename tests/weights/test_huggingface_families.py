"""Hugging Face's families against transformers: configs, features, round trips, refusals."""

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
from leanclip.weights import Weights, huggingface, load_into, read_weights, write_weights
from leanclip.weights.huggingface_config import ACTIVATIONS, architecture, infer
from leanclip.weights.huggingface_families import FAMILIES
from leanclip.weights.names import to_theirs

MODERN = PROJECT / "tests" / "data" / "modern"
GOLDEN = sorted(folder.name for folder in MODERN.glob("hf-*"))
CLASSES = {
    "clip": "CLIP",
    "metaclip_2": "MetaClip2",
    "siglip": "Siglip",
    "siglip2": "Siglip2",
    "chinese_clip": "ChineseCLIP",
}
NO_CONFIG = {"model_type", "transformers_version", "architectures", "_name_or_path", "dtype"}


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


# --- terse configs


TERSE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "siglip 1 base 224": (
        {"model_type": "siglip_text_model"},
        {"model_type": "siglip_vision_model"},
    ),
    "siglip 2 base 512": (
        {"vocab_size": 256000},
        {"image_size": 512},
    ),
    "siglip 2 large": (
        {
            **{"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16},
            **{"num_hidden_layers": 24, "vocab_size": 256000},
        },
        {
            **{"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16},
            **{"num_hidden_layers": 24, "image_size": 256},
        },
    ),
    "so400m 14 384": (
        {
            **{"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16},
            **{"num_hidden_layers": 27},
        },
        {
            **{"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16},
            **{"num_hidden_layers": 27, "image_size": 384, "patch_size": 14},
        },
    ),
    "giant": (
        {"hidden_size": 1152, "num_attention_heads": 16, "projection_size": 1536},
        {"hidden_size": 1536, "intermediate_size": 6144, "num_attention_heads": 16},
    ),
    "nothing": ({}, {}),
}


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", TERSE)
def test_terse_configs_have_transformers_defaults(name: str, kind: str) -> None:
    text, vision = (dict(section) for section in TERSE[name])
    if kind in ("clip", "metaclip_2", "chinese_clip"):
        text.pop("projection_size", None)
    for section in (text, vision):
        section.pop("model_type", None)
    values = {"text_config": text, "vision_config": vision}
    known = getattr(transformers(), f"{CLASSES[kind]}Config")(**json.loads(json.dumps(values)))
    ours = architecture(FAMILIES[kind], values)
    for tower, theirs in (("vision", known.vision_config), ("transformer", known.text_config)):
        assert getattr(ours, f"{tower}_layers") == theirs.num_hidden_layers
        assert getattr(ours, f"{tower}_heads") == theirs.num_attention_heads
        width = getattr(ours, f"{tower}_width")
        assert width == theirs.hidden_size
        assert int(width * getattr(ours, f"{tower}_mlp_ratio")) == theirs.intermediate_size
        assert getattr(ours, f"{tower}_norm_eps") == theirs.layer_norm_eps
        assert ours.activations[tower != "vision"] == ACTIVATIONS[theirs.hidden_act]
    assert ours.vision_patch_size == known.vision_config.patch_size
    assert ours.vocab_size == known.text_config.vocab_size
    assert ours.text_positions == known.text_config.max_position_embeddings
    if kind == "siglip2":
        assert ours.vision_patch_size
        assert ours.image_resolution == 16 * ours.vision_patch_size
    else:
        assert ours.image_resolution == known.vision_config.image_size
    if kind.startswith("siglip"):
        assert ours.embed_dim == known.text_config.projection_size
        assert ours.transformer_pad_id == known.text_config.pad_token_id
    else:
        assert ours.embed_dim == known.projection_dim


# --- tensors alone

ALONE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "siglip 1": ("siglip", {"image_size": 384, "patch_size": 14, "hidden_size": 1152}, {}),
    "siglip 2": ("siglip", {"image_size": 378, "patch_size": 14}, {"vocab_size": 256000}),
    "naflex": ("siglip2", {"num_patches": 256}, {"vocab_size": 256000}),
    "chinese": ("chinese_clip", {"patch_size": 16}, {"vocab_size": 21128}),
}


@pytest.mark.parametrize("name", ALONE)
def test_tensors_alone_have_the_published_architecture(name: str) -> None:
    kind, vision, text = ALONE[name]
    family, few = FAMILIES[kind], {"num_hidden_layers": 1, "intermediate_size": 640}
    width = vision.get("hidden_size", 768)
    vision = vision | few | {"num_attention_heads": family.vision_heads[width]}
    top = {"projection_size": width} if "siglip" in kind else {}
    values = {"vision_config": vision, "text_config": text | few | top}
    expected = architecture(family, values)
    with torch.device("meta"):
        tensors = CLIP(**to_plain(expected)).state_dict()
    assert infer(family, tensors) == expected
    theirs = {key: torch.empty_like(t) for key, t in to_theirs(tensors, family.rules).items()}
    weights = huggingface.from_state_dict(Path("x"), theirs, None)
    assert weights.model == expected
    assert weights.preprocess is not None
    expected_filter = "bilinear" if text.get("vocab_size") == 256000 else "bicubic"
    assert weights.preprocess.interpolation == expected_filter
    assert "load its folder to encode texts" in weights.notes[0]


def test_tensors_alone_of_other_widths_need_arch(tmp_path: Path) -> None:
    file = MODERN / "hf-siglip" / "model.safetensors"
    assert read_weights(file).model is None
    arch = read_weights(MODERN / "hf-siglip").model
    assert arch is not None
    with_arch = read_weights(file, arch=to_plain(arch))
    assert with_arch.model == arch
    assert with_arch.tensors.keys() == read_weights(MODERN / "hf-siglip").tensors.keys()
    assert read_weights(MODERN / "hf-chinese-clip" / "model.safetensors").model is None
    with pytest.raises(WeightsError, match="--arch"):
        write_weights(read_weights(file), tmp_path / "w", "leanclip")


# --- refusals

SIGLIP = {"vision_config": VISION, "text_config": TEXT | {"projection_size": 30}}
BAD_CONFIGS: dict[str, tuple[str, str, str, Any, str]] = {
    "projection": ("siglip", "text_config", "projection_size", 31, "projection_size: 31"),
    "no head": ("siglip", "vision_config", "vision_use_head", False, "vision_use_head: False"),
    "grey": ("siglip", "vision_config", "num_channels", 1, "num_channels: 1"),
    "activation": ("siglip", "text_config", "hidden_act", "relu", "text_config.hidden_act: 'relu'"),
    "no activation": (
        "siglip",
        "vision_config",
        "hidden_act",
        ["gelu"],
        "vision_config.hidden_act",
    ),
    "heads": ("siglip", "vision_config", "num_attention_heads", 4, "num_attention_heads 4"),
    "width": ("siglip", "vision_config", "hidden_size", "30", "hidden_size"),
    "layers": ("siglip", "text_config", "num_hidden_layers", 0, "text_config.num_hidden_layers"),
    "eps": ("siglip", "text_config", "layer_norm_eps", -1e-6, "text_config.layer_norm_eps"),
    "oblong": ("siglip", "vision_config", "image_size", [20, 30], r"image_size: \[20, 30\]"),
    "small": ("siglip", "vision_config", "image_size", 5, "image_size 5 is less than .*patch_size"),
    "grid": ("siglip2", "vision_config", "num_patches", 30, "num_patches: 30 is not a square"),
    "no grid": ("siglip2", "vision_config", "num_patches", None, "num_patches"),
    "many ends": ("metaclip_2", "text_config", "eos_token_id", [1, 2], "eos_token_id"),
    "no end": ("metaclip_2", "text_config", "eos_token_id", None, "eos_token_id"),
    "relative": ("chinese_clip", "text_config", "position_embedding_type", "relative_key", "posit"),
    "no types": ("chinese_clip", "text_config", "type_vocab_size", -1, "type_vocab_size"),
    "a section": ("siglip", "text_config", "", "x", "text_config: 'x' is not a section"),
    "no patch": (
        "siglip2",
        "vision_config",
        "patch_size",
        None,
        "patch_size: None is not a number",
    ),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configs_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    kind, section, field, value, words = BAD_CONFIGS[name]
    values: dict[str, Any] = json.loads(json.dumps(SIGLIP)) | {"model_type": kind}
    if field:
        values[section][field] = value
    else:
        values[section] = value
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").write_bytes(
        (MODERN / "hf-siglip" / "model.safetensors").read_bytes()
    )
    with pytest.raises(WeightsError, match=f"config.json: .*{words}") as error:
        read_weights(tmp_path)
    assert "\n" not in str(error.value)


def test_sizes_that_the_tensors_have_not(tmp_path: Path) -> None:
    for file in ("config.json", "model.safetensors", "spiece.model", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((MODERN / "hf-siglip" / file).read_bytes())
    values = json.loads((tmp_path / "config.json").read_text())
    values["text_config"]["vocab_size"] = 510  # the embedding has 500
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(
        WeightsError, match=r"token_embedding.weight \(500, 64\) there, \(510, 64\)"
    ):
        write_weights(read_weights(tmp_path), tmp_path / "out", "leanclip")


CANNOT_HOLD: dict[str, tuple[dict[str, Any], str]] = {
    "rotary": ({"vision_positions": "rotary"}, "SiglipModel cannot hold vision_positions: rotary"),
    "mean": ({"vision_pool": "avg"}, "cannot hold vision_pool: avg"),
    "no bias": ({"logit_bias": False}, "SiglipModel cannot hold logit_bias: False"),
    "heads": ({"vision_pool_heads": 1}, "cannot hold vision_pool_heads: 1"),
    "a hidden width": ({"vision_pool_mlp_ratio": 2.0}, "cannot hold vision_pool_mlp_ratio: 2.0"),
    "causal": ({"transformer_causal": True}, "cannot hold transformer_causal: True"),
    "scale": ({"vision_layer_scale": 0.1}, "cannot hold vision_layer_scale: 0.1"),
}


@pytest.mark.parametrize("name", CANNOT_HOLD)
def test_what_no_family_has_is_refused_by_name(name: str, tmp_path: Path) -> None:
    changes, words = CANNOT_HOLD[name]
    config = read_weights(MODERN / "hf-siglip").model
    assert config is not None
    model = CLIP(**to_plain(config) | changes)
    size = Preprocess(config.image_resolution, resize="squash")
    weights = Weights(Path("odd"), "leanclip", model.state_dict(), model.config, size)
    with pytest.raises(WeightsError, match=f"^odd: Hugging Face's {words}|^odd: .*{words}"):
        write_weights(weights, tmp_path / "w", "hf")
    assert not (tmp_path / "w").exists()
