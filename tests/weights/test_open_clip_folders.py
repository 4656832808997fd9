"""open_clip's folders: golden ones, conversion, its configurations, bad settings."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROJECT
from PIL import Image
from safetensors.torch import load_file
from skimage import data as photographs
from torch.nn import functional as F

import leanclip
from leanclip import CLIP, ConfigError, WeightsError
from leanclip.config.sections import to_plain
from leanclip.model.skip_init import meta_device
from leanclip.preprocess.text import Tokenizer
from leanclip.weights import read_weights, write_weights
from leanclip.weights.open_clip_config import architecture
from leanclip.weights.open_clip_towers import timm_tower

MODERN = PROJECT / "tests" / "data" / "modern"
GOLDEN = sorted(folder.name for folder in MODERN.glob("oc-*"))
CONFIG, FILE = "open_clip_config.json", "open_clip_model.safetensors"
CONFIGS = [json.loads(line) for line in (MODERN / "open_clip_configs.jsonl").open()]


def difference(ours: torch.Tensor, theirs: Any) -> float:
    """The largest relative difference of rows."""
    theirs = torch.as_tensor(theirs)
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())


def unit(x: Any) -> torch.Tensor:
    return F.normalize(torch.as_tensor(x), dim=-1)


def photos() -> list[Image.Image]:
    cat, coffee, rocket = (
        Image.fromarray(getattr(photographs, name)()) for name in ("chelsea", "coffee", "rocket")
    )
    return [cat, coffee, rocket, cat.crop((40, 20, 90, 290))]


def are_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) and tensor.dtype == other[name].dtype
        for name, tensor in one.items()
    )


def edited(folder: Path, section: str, **fields: Any) -> Path:
    """A copy of oc-siglip with other settings."""
    values = json.loads((MODERN / "oc-siglip" / CONFIG).read_text())
    place = values["model_cfg"] if section == "model_cfg" else values["model_cfg"][section]
    for name, value in fields.items():
        place[name] = value
    folder.mkdir()
    for file in (MODERN / "oc-siglip").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / CONFIG).write_text(json.dumps(values))
    return folder


# --- golden folders


def test_a_folder_with_several_pt_files_needs_a_name(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).write_bytes((MODERN / "pe-core-pt" / "model.pt").read_bytes())
    with pytest.raises(WeightsError, match="name a file"):
        read_weights(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("name", [*GOLDEN, "pe-core-pt"])
def test_golden_folders(name: str) -> None:
    known = np.load(MODERN / name / "io.npz")
    clip = leanclip.load(MODERN / name, device="cpu")
    pixels = torch.stack([clip.preprocess(photo) for photo in photos()])
    assert np.array_equal(pixels, known["image"])
    images = clip.embed_images(photos(), as_torch=True)
    words = clip.encode_text(torch.from_numpy(known["text"]))
    assert difference(images, unit(known["image_features"])) < 1e-5
    assert difference(unit(words), unit(known["text_features"])) < 1e-5
    bias = 0 if clip.model.logit_bias is None else clip.model.logit_bias
    logits = images @ unit(words).T * clip.model.logit_scale.exp() + bias
    assert difference(logits, known["logits_per_image"]) < 1e-5
    if (file := MODERN / name / "tokens.jsonl").exists():
        lines = [json.loads(line) for line in file.open()]
        texts = [line["text"] for line in lines]
        ids = clip.model.tokenizer(texts, truncate=True)
        assert ids.tolist() == [line["ids"] for line in lines]
        count = len(words)
        known_words = unit(known["text_features"])
        assert (
            difference(clip.embed_texts(texts, as_torch=True, truncate=True)[:count], known_words)
            < 1e-5
        )


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_folders_there_and_back(name: str, tmp_path: Path) -> None:
    weights = read_weights(MODERN / name)
    write_weights(weights, tmp_path / "native", "leanclip")
    write_weights(read_weights(tmp_path / "native"), tmp_path / "w", "open_clip")
    assert are_same(load_file(MODERN / name / FILE), load_file(tmp_path / "w" / FILE))
    again = read_weights(tmp_path / "w")
    for field in ("model", "preprocess", "tokenizer"):
        assert getattr(again, field) == getattr(weights, field)
    before, after = (
        json.loads((folder / CONFIG).read_text())["model_cfg"]
        for folder in (MODERN / name, tmp_path / "w")
    )
    for key in ("embed_dim", "custom_text", "init_logit_bias"):
        assert before.get(key) == after.get(key)


@pytest.mark.parametrize("name", ["oc-siglip", "oc-siglip2", "oc-dfn", "oc-metaclip2"])
def test_open_clips_form_to_hugging_faces_and_back(name: str, tmp_path: Path) -> None:
    weights = read_weights(MODERN / name)
    write_weights(weights, tmp_path / "hf", "hf")
    between = read_weights(tmp_path / "hf")
    write_weights(between, tmp_path / "oc", "open_clip")
    again = read_weights(tmp_path / "oc")
    assert between.model == again.model == weights.model
    assert are_same(load_file(MODERN / name / FILE), load_file(tmp_path / "oc" / FILE))


@pytest.mark.parametrize("name", ["hf-siglip", "hf-siglip2", "hf-metaclip2", "hf-chinese-clip"])
def test_hugging_faces_form_to_open_clips_and_back(name: str, tmp_path: Path) -> None:
    weights = read_weights(MODERN / name)
    write_weights(weights, tmp_path / "oc", "open_clip")
    between = read_weights(tmp_path / "oc")
    write_weights(between, tmp_path / "hf", "hf")
    again = read_weights(tmp_path / "hf")
    assert between.model == again.model == weights.model
    file = "model.safetensors"
    assert are_same(load_file(MODERN / name / file), load_file(tmp_path / "hf" / file))
    texts = ["a photo of a cat", "Two Dogs"]
    one, two = ((w.tokenizer or Tokenizer())(texts) for w in (weights, between))
    assert torch.equal(one, two)


# --- open_clip's configurations


def refusal(values: dict[str, Any]) -> str:
    """The message on a configuration that is not read; empty: it is read."""
    try:
        architecture(values)
    except ConfigError as error:
        return str(error)
    return ""


def test_table_of_open_clips_configurations() -> None:
    """docs/checkpoints.md has these counts."""
    messages = {one["name"]: refusal(one["model_cfg"]) for one in CONFIGS}
    assert all("supported" in message for message in messages.values() if message)
    assert not any("\n" in message for message in messages.values())
    count = Counter((one["release"], bool(messages[one["name"]])) for one in CONFIGS)
    assert count == {("3.3.0", False): 94, ("3.3.0", True): 50, ("main", True): 37}
    others = ("EVA", "ConvNeXt", "ViTamin", "Swin", "MobileCLIP", "NLLB", "mT5")
    rest = {
        n for n, message in messages.items() if message and not any(o in message for o in others)
    }
    known = {one["name"] for one in CONFIGS if one["release"] == "3.3.0"}
    assert rest & known == {"vit_medium_patch16_gap_256", "vit_relpos_medium_patch16_cls_224"}


def test_parameters_of_open_clips_configurations() -> None:
    """Of each tower, as its docs/model_profile.csv has them in millions."""
    checked = 0
    for one in CONFIGS:
        if "parameters" not in one or refusal(one["model_cfg"]):
            continue
        with meta_device():
            model = CLIP(**to_plain(architecture(one["model_cfg"])))
        image = sum(p.numel() for p in model.visual.parameters())
        text = model.parameter_count() - image
        assert abs(image / 1e6 - one["parameters"]["image"]) < 0.006, one["name"]
        assert abs(text / 1e6 - one["parameters"]["text"]) < 0.006, one["name"]
        checked += 1
    assert checked == 58


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("vit_base_patch16_siglip_224", "gelu"),
        ("vit_base_patch16_siglip_512", "gelu"),
        ("vit_base_patch32_siglip_256", "gelu_tanh"),
        ("vit_large_patch16_siglip_384.webli", "gelu"),
        ("vit_large_patch16_siglip_512.v2_webli", "gelu_tanh"),
        ("vit_so400m_patch14_siglip_378", "gelu"),
        ("vit_so400m_patch16_siglip_384", "gelu_tanh"),
        ("vit_giantopt_patch16_siglip_256", "gelu_tanh"),
        ("vit_so400m_patch16_siglip_gap_256", "gelu_tanh"),
        ("vit_pe_core_large_patch14_336", "gelu"),
        ("vit_large_patch14_clip_quickgelu_336.openai", "quick_gelu"),
    ],
)
def test_activations_by_timms_names(name: str, activation: str) -> None:
    tower = timm_tower(name)
    assert tower is not None
    assert tower.settings["activation"] == activation


# --- bad settings


@pytest.mark.parametrize(
    ("section", "fields", "words"),
    [
        ("vision_cfg", {"timm_model_name": "eva02_base_patch16_clip_224"}, "EVA-CLIP.*instead"),
        ("vision_cfg", {"timm_model_name": "vit_base_patch16_rpn_224"}, "not supported; use"),
        ("vision_cfg", {"timm_model_name": 3}, "timm_model_name: '3' is not supported"),
        ("vision_cfg", {"timm_model_name": "vit_base_patch16_224"}, "timm_pool: 'map' with vit"),
        ("vision_cfg", {"timm_model_name": "vit_pe_core_base_patch16_224"}, "missing keys: vis"),
        ("vision_cfg", {"timm_pool": "avg"}, "timm_pool: 'avg' with vit_base"),
        ("vision_cfg", {"timm_pool": ""}, "timm_pool: '' with vit_base"),
        ("vision_cfg", {"timm_proj": "mlp"}, "timm_proj: 'mlp' is not supported"),
        ("vision_cfg", {"timm_proj": "linear"}, "missing keys: visual.proj"),
        ("vision_cfg", {"image_size": [48, 32]}, r"image_size: \[48, 32\] is not a square"),
        ("vision_cfg", {"image_size": "48"}, "not a supported architecture"),
        ("vision_cfg", {"timm_model_name": "", "head_width": 0}, "head_width: 0 is not a width"),
        ("text_cfg", {"hf_model_name": "google/mt5-base"}, "mT5.* use instead"),
        ("text_cfg", {"hf_model_name": "facebook/nllb-200"}, "NLLB.* use instead"),
        ("text_cfg", {"hf_model_name": "distilbert-base"}, "'distilbert-base' is not supported"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, "its tensors have no token_type_embedding"),
        ("text_cfg", {"hf_pooler_type": "max_pooler"} | {"hf_model_name": "bert"}, "no token_type"),
        ("text_cfg", {"norm_kwargs": {"bias": False}}, "norm_kwargs: .* is not supported, only"),
        ("text_cfg", {"norm_kwargs": {"eps": "x"}}, "transformer_norm_eps"),
        ("text_cfg", {"act_kwargs": {"approximate": "no"}}, "act_kwargs: .* is not supported"),
        ("text_cfg", {"proj_bias": False}, "unexpected keys: text_projection_bias|shapes differ"),
        ("text_cfg", {"proj_type": "mlp"}, "transformer_projection|missing"),
        ("text_cfg", {"pool_type": "none"}, "transformer_pool: should be"),
        ("text_cfg", {"tokenizer_kwargs": 3}, "text_cfg: cannot be read"),
        ("text_cfg", {"qk_norm": True}, "text_cfg.qk_norm: 'True' is not supported"),
        ("text_cfg", {"vocab_size": 499}, "shapes differ|its tokeniser has"),
        ("model_cfg", {"text_cfg": None}, "not a supported architecture|cannot be read"),
        ("model_cfg", {"vision_cfg": 3}, "not a supported architecture|cannot be read"),
        ("model_cfg", {"audio_cfg": {"a": 1}}, "model_cfg.audio_cfg: .* is not supported"),
        ("model_cfg", {"embed_dim": 65}, "vision_projection none: vision_width 64"),
    ],
)
def test_bad_settings_are_one_line(
    section: str, fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = edited(tmp_path / "w", section, **fields)
    with pytest.raises(WeightsError, match=words) as caught:
        leanclip.load(folder, device="cpu")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
