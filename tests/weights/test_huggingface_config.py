"""Hugging Face's config.json: transformers' defaults, tensors without it, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT

from leanclip import CLIP, WeightsError
from leanclip.config.sections import to_plain
from leanclip.preprocess.images import Preprocess
from leanclip.weights import Weights, huggingface, read_weights, write_weights
from leanclip.weights.huggingface_config import ACTIVATIONS, architecture, infer
from leanclip.weights.huggingface_families import FAMILIES
from leanclip.weights.names import to_theirs

MODERN = PROJECT / "tests" / "data" / "modern"
CLASSES = {
    "clip": "CLIP",
    "metaclip_2": "MetaClip2",
    "siglip": "Siglip",
    "siglip2": "Siglip2",
    "chinese_clip": "ChineseCLIP",
}
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


def transformers() -> Any:
    return pytest.importorskip("transformers")


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
