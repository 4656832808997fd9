"""Hugging Face's config.json as an architecture, and back, for each family.

config.json -> section by section, a family's defaults for what it omits -> ModelConfig
ModelConfig -> the first family without a mismatch -> config.json
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from leanclip.config.model import ModelConfig
from leanclip.config.sections import parse
from leanclip.errors import ConfigError
from leanclip.weights.huggingface_families import (
    CHINESE_CLIP,
    CLIP,
    FAMILIES,
    METACLIP_2,
    NAFLEX,
    SIGLIP,
    Family,
)
from leanclip.weights.weights import mlp_ratio, square_side

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
CHINESE_CONTEXT = 52  # of Chinese-CLIP's own code; its table has more positions

_TOWERS = {"vision": "vision_config", "transformer": "text_config"}
_FIELDS = {  # of both sections, by the part of our name after the tower's
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "norm_eps": "layer_norm_eps",
}
_SIGLIP_1 = 32000  # ids of the first generation's tokeniser
_HIGHEST = 2  # CLIPModel's eos_token_id for: read at the highest id
_CARRIED = {  # settings that config.json has a field for, or that another one determines
    *(f"{tower}_{part}" for tower in _TOWERS for part in (*_FIELDS, "mlp_ratio", "activation")),
    *("embed_dim", "image_resolution", "vision_patch_size", "activation"),
    *("vision_pool_heads", "vision_pool_mlp_ratio"),
    *("context_length", "vocab_size", "transformer_positions", "transformer_pad_id"),
    "transformer_eos_id",
}


def architecture(family: Family, values: dict[str, Any]) -> ModelConfig:
    """The architecture of a config.json.

    Raises:
        ValueError: a field's value is not supported, or not transformers'; names it.
        ConfigError: a size is out of range or does not fit another.
    """
    vision = {**family.vision, **_section(values, "vision_config")}
    text = {**family.text, **_section(values, "text_config")}
    _check_fields(vision, text)
    arch = dict(family.settings) | {"vocab_size": text["vocab_size"]}
    for tower, section in (("vision", vision), ("transformer", text)):
        arch |= {f"{tower}_{ours}": section[theirs] for ours, theirs in _FIELDS.items()}
        hidden = section["intermediate_size"]
        arch[f"{tower}_mlp_ratio"] = mlp_ratio(section["hidden_size"], hidden)
    first, second = (_activation(name, section) for name, section in _sections(vision, text))
    arch |= {"activation": first, "transformer_activation": None if second == first else second}
    arch["vision_patch_size"] = square_side("patch_size", vision["patch_size"])
    if type(arch["vision_patch_size"]) is not int:
        raise ValueError(f"vision_config.patch_size: {vision['patch_size']!r} is not a number")
    if family is NAFLEX:
        arch["image_resolution"] = _grid_side(vision["num_patches"]) * arch["vision_patch_size"]
    else:
        arch["image_resolution"] = square_side("image_size", vision["image_size"])
    if family in (SIGLIP, NAFLEX):
        arch["embed_dim"] = vision["hidden_size"]
        width = text.get("projection_size")
        width = text["hidden_size"] if width is None else width
        if width != arch["embed_dim"]:
            raise ValueError(
                f"text_config.projection_size: {width}, images have {arch['embed_dim']} features"
            )
    else:
        arch["embed_dim"] = values.get("projection_dim", 512)
    try:
        return parse(ModelConfig, arch | _text(family, text), where="")
    except ConfigError as error:
        raise ConfigError(_by_their_names(str(error).removeprefix(": "))) from None


def infer(family: Family, tensors: Mapping[str, torch.Tensor]) -> ModelConfig | None:
    """The architecture of tensors by our names; None: theirs is not among the published ones.

    Their family determines activations and eps, their widths the heads, as they were published.

    Raises:
        ConfigError: they do not belong to one model.
        LookupError: a tensor is missing.
    """
    grid, words = tensors["visual.positional_embedding"], tensors["positional_embedding"]
    heads = family.vision_heads.get(grid.shape[1]), family.text_heads.get(words.shape[1])
    if None in heads:
        return None
    positions = grid.shape[0] - ("visual.class_embedding" in tensors)
    patch = tensors["visual.conv1.weight"].shape[-1]
    vocabulary = tensors["token_embedding.weight"].shape[0]
    side = _grid_side(positions) * patch
    if (side, patch, vocabulary) == (378, 14, _SIGLIP_1):
        side = 384  # the first so400m: of its images the rest of six pixels is dropped
    vision = {"patch_size": patch, "image_size": side, "num_patches": positions}
    text = {"max_position_embeddings": words.shape[0], "vocab_size": vocabulary}
    if "token_type_embedding" in tensors:
        text["type_vocab_size"] = len(tensors["token_type_embedding"])
    blocks = "visual.transformer.resblocks", "transformer.resblocks"
    for section, table, own, count in zip(
        (vision, text), (grid, words), blocks, heads, strict=True
    ):
        layers = {name.split(".")[own.count(".") + 1] for name in tensors if name.startswith(own)}
        section |= {
            "hidden_size": table.shape[1],
            "num_attention_heads": count,
            "num_hidden_layers": len(layers),
            "intermediate_size": len(tensors[f"{own}.0.mlp.c_fc.weight"]),
        }
    text["projection_size"] = width = tensors["text_projection"].shape[1]
    values = {"vision_config": vision, "text_config": text, "projection_dim": width}
    return architecture(family, values)


def config(family: Family, model: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a model of a family."""
    sections: dict[str, dict[str, Any]] = {}
    for (tower, name), own in zip(_TOWERS.items(), model.activations, strict=True):
        width = getattr(model, f"{tower}_width")
        sections[name] = {
            "model_type": f"{family.model_type}_{name.removesuffix('_config')}_model",
            **{theirs: getattr(model, f"{tower}_{ours}") for ours, theirs in _FIELDS.items()},
            "intermediate_size": int(width * getattr(model, f"{tower}_mlp_ratio")),
            "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == own),
        }
    vision, text = sections.values()
    vision |= {
        "num_attention_heads": model.attention_heads,
        "num_channels": 3,
        "patch_size": model.vision_patch_size,
    }
    text |= {
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.text_positions,
        "pad_token_id": model.transformer_pad_id,
    }
    top: dict[str, Any] = {"projection_dim": model.embed_dim, "logit_scale_init_value": 2.6592}
    if family is NAFLEX:
        vision["num_patches"] = (model.image_resolution // (model.vision_patch_size or 1)) ** 2
    else:
        vision["image_size"] = model.image_resolution
    if family in (SIGLIP, NAFLEX):
        text["projection_size"], top = model.embed_dim, {}
    elif family is CHINESE_CLIP:
        text["type_vocab_size"] = model.transformer_token_types
    else:
        vision["projection_dim"] = text["projection_dim"] = model.embed_dim
        end = _eos_token_id(model)
        text |= {"bos_token_id": model.vocab_size - 2 if family is CLIP else 0, "eos_token_id": end}
    kind = {"architectures": [family.model], "model_type": family.model_type, "dtype": dtype}
    return kind | top | sections


def family_of(model: ModelConfig) -> Family:
    """The family whose class in transformers computes what a model does.

    Raises:
        ValueError: there is none; names the nearest, and the settings that it has not.
    """
    if not isinstance(model.vision_layers, int):
        raise ValueError(f"Hugging Face's {CLIP.model} cannot hold a ResNet")
    found = {name: _mismatches(family, model) for name, family in FAMILIES.items()}
    best = min(found, key=lambda name: len(found[name]))
    if found[best]:
        settings = ", ".join(f"{name}: {getattr(model, name)}" for name in found[best])
        raise ValueError(f"Hugging Face's {FAMILIES[best].model} cannot hold {settings}")
    return FAMILIES[best]


def _mismatches(family: Family, model: ModelConfig) -> list[str]:
    """The settings of a model that a family cannot have."""
    own = {name: info.default for name, info in ModelConfig.model_fields.items()}
    own |= family.settings
    pools = {"argmax", "eos"} if family is CLIP else {own["transformer_pool"]}
    wrong = [
        name
        for name, value in own.items()
        if name not in _CARRIED and name != "transformer_pool" and getattr(model, name) != value
    ]
    is_bert = family is CHINESE_CLIP
    if is_bert and model.transformer_token_types > 0:
        wrong.remove("transformer_token_types")
    elif is_bert:
        wrong.append("transformer_token_types")
    # CLIPModel reads 2 and the last id as: at the highest id
    is_odd_end = model.transformer_eos_id in (_HIGHEST, model.vocab_size - 1)
    checks = {
        "transformer_pool": model.transformer_pool in pools,
        "transformer_eos_id": not (family is CLIP and is_odd_end),
        "vision_pool_heads": model.vision_pool_heads in (None, model.attention_heads),
        "vision_pool_mlp_ratio": _hidden(model, model.vision_pool_mlp_ratio)
        == _hidden(model, None),
        "transformer_positions": is_bert or model.text_positions == model.context_length,
        "embed_dim": "vision_projection" not in family.settings
        or model.embed_dim == model.vision_width,
        "image_resolution": family is not NAFLEX
        or model.image_resolution % (model.vision_patch_size or 1) == 0,
    }
    return wrong + [name for name, fits in checks.items() if not fits]


def _hidden(model: ModelConfig, ratio: float | None) -> int:
    """The hidden width of the image tower's MLPs at a ratio; None: its own."""
    return int(model.vision_width * (ratio or model.vision_mlp_ratio))


def _by_their_names(message: str) -> str:
    """A message on our settings, by the names of config.json's fields."""
    names = {
        f"{tower}_{ours}": f"{section}.{theirs}"
        for tower, section in _TOWERS.items()
        for ours, theirs in (_FIELDS | {"mlp_ratio": "intermediate_size"}).items()
    }
    names |= {
        "image_resolution": "vision_config.image_size",
        "vision_patch_size": "vision_config.patch_size",
        "context_length": "text_config.max_position_embeddings",
        "vocab_size": "text_config.vocab_size",
        "transformer_token_types": "text_config.type_vocab_size",
        "transformer_pad_id": "text_config.pad_token_id",
        "transformer_eos_id": "text_config.eos_token_id",
        "embed_dim": "projection_dim",
    }
    return re.sub(r"\b(" + "|".join(names) + r")\b", lambda match: names[match[1]], message)


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A tower's settings: those of `NAME_dict`, an older form, if present.

    As in transformers 5, the fields that it omits then have their defaults, whatever is in `NAME`.
    """
    older = values.get(f"{name}_dict")
    found = (values.get(name) or {}) if older is None else older
    if not isinstance(found, dict):
        raise ValueError(f"{name}: {found!r} is not a section of settings")
    return found


def _sections(vision: dict[str, Any], text: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return list(zip(_TOWERS.values(), (vision, text), strict=True))


def _check_fields(vision: dict[str, Any], text: dict[str, Any]) -> None:
    """Refuse what transformers' classes do with a field and a model here does not.

    What is calculated with must be numbers; `parse` checks the others.
    """
    numbers = ("hidden_size", "intermediate_size", "num_patches", "max_position_embeddings")
    for name, section in _sections(vision, text):
        for fieldname in (name for name in numbers if name in section):
            found = section[fieldname]
            if type(found) is not int or found < 1:
                raise ValueError(f"{name}.{fieldname}: {found!r} is not a whole positive number")
    supported = (
        ("vision_config", vision, "num_channels", 3),
        ("vision_config", vision, "vision_use_head", True),
        ("text_config", text, "position_embedding_type", "absolute"),
    )
    for name, section, fieldname, value in supported:
        if section.get(fieldname, value) != value:
            raise ValueError(f"{name}.{fieldname}: {section[fieldname]} is not supported")


def _activation(name: str, section: dict[str, Any]) -> str:
    found = section["hidden_act"]
    if not isinstance(found, str) or found not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"{name}.hidden_act: {found!r} is not supported, only {known}")
    return ACTIVATIONS[found]


def _grid_side(patches: int) -> int:
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"vision_config.num_patches: {patches} is not a square number")
    return side


def _text(family: Family, text: dict[str, Any]) -> dict[str, Any]:
    """The text tower's own: its positions, padding, and where it is pooled."""
    positions = text["max_position_embeddings"]
    found = {"context_length": positions, "transformer_pad_id": text.get("pad_token_id", 0)}
    if family is CLIP:
        return {"context_length": positions} | _clip_pool(text)  # its pad_token_id has no effect
    if family is METACLIP_2:
        return found | {"transformer_eos_id": _eos(text)}
    if family is CHINESE_CLIP:
        found["transformer_token_types"] = text["type_vocab_size"]
        if positions > CHINESE_CONTEXT:
            found |= {"context_length": CHINESE_CONTEXT, "transformer_positions": positions}
    return found


def _clip_pool(text: dict[str, Any]) -> dict[str, Any]:
    """Where CLIPModel pools the text: at the first `eos_token_id`; 2 means at the highest id."""
    end = _eos(text)
    if end in (_HIGHEST, text["vocab_size"] - 1):  # the last id is the highest
        return {"transformer_pool": "argmax"}
    return {"transformer_pool": "eos", "transformer_eos_id": end}


def _eos(text: dict[str, Any]) -> int:
    end = text["eos_token_id"]
    if type(end) is not int:
        raise ValueError(f"text_config.eos_token_id: {end!r} is not a token id")
    return end


def _eos_token_id(model: ModelConfig) -> int:
    """The id that makes a class pool a text where the model does."""
    if model.transformer_eos_id is not None:
        return model.transformer_eos_id
    last = int(CLIP.text["eos_token_id"])
    return last if model.vocab_size == last + 1 else _HIGHEST
