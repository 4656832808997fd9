"""open_clip's folders: `open_clip_config.json` beside the weights, under OpenAI's names.

A CustomTextCLIP puts the text tower's names under `text.`.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from leanclip.config.model import ModelConfig
from leanclip.config.sections import parse
from leanclip.errors import ConfigError, WeightsError
from leanclip.preprocess.images import CLIP_MEAN, CLIP_STD, Preprocess, rgb_triple
from leanclip.preprocess.text import Tokenizer
from leanclip.weights import tokenizer as tokenizers
from leanclip.weights.files import MALFORMED, find_file, read_json
from leanclip.weights.state_dict import read_state_dict
from leanclip.weights.weights import Weights, square_side

CONFIG = "open_clip_config.json"
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

_VISION = {  # theirs: ours
    "layers": "vision_layers",
    "width": "vision_width",
    "patch_size": "vision_patch_size",
    "image_size": "image_resolution",
    "mlp_ratio": "vision_mlp_ratio",
    "pool_type": "vision_pool",
    "final_ln_after_pool": "vision_norm_after_pool",
}
_TEXT = {
    "context_length": "context_length",
    "vocab_size": "vocab_size",
    "width": "transformer_width",
    "heads": "transformer_heads",
    "layers": "transformer_layers",
    "mlp_ratio": "transformer_mlp_ratio",
    "pool_type": "transformer_pool",
}
_DEFAULTS: dict[str, dict[str, Any]] = {  # open_clip's, of what a section leaves out
    "vision_cfg": {
        "layers": 12,
        "width": 768,
        "head_width": 64,
        "patch_size": 16,
        "image_size": 224,
        "no_ln_pre": False,
        "act_kwargs": None,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 512,
        "heads": 8,
        "layers": 12,
        "no_causal_mask": False,
        "eos_id": 2,
        "act_kwargs": None,
    },
}
_SUPPORTED: dict[str, tuple] = {  # values other than off of fields without an equivalent here
    "norm_kwargs": ({"eps": 1e-5},),
    "pos_embed_type": ("learnable",),
    "tokenizer_mode": ("clip",),
    "tokenizer_kwargs": ({"clean": "lower"},),
    "proj_type": ("linear",),
}
_UNUSED = {  # of training, of Python's side, or of a tower that is not there
    "vision_cfg": "patch_dropout output_tokens attn_pooler_queries attn_pooler_heads n_queries "
    "timm_model_pretrained timm_pool timm_proj timm_proj_bias timm_drop timm_drop_path",
    "text_cfg": "output_tokens hf_model_pretrained hf_proj_type hf_pooler_type hf_model_config",
    "model_cfg": "embed_dim vision_cfg text_cfg quick_gelu custom_text init_logit_scale "
    "init_logit_bias nonscalar_logit_scale cast_dtype output_dict",
}

_PREPROCESS = {"resize": "resize_mode", "interpolation": "interpolation", "fill": "fill_color"}


def is_folder(folder: Path) -> bool:
    """Whether a folder is in this format."""
    return (folder / CONFIG).is_file()


def is_state_dict(names: Collection[str]) -> bool:
    """Whether tensors may have this format's names, which are OpenAI's: always."""
    return True


def from_state_dict(
    source: Path, tensors: Mapping[str, torch.Tensor], model: ModelConfig | None
) -> Weights:
    """Weights of tensors alone, which do not tell their activation."""
    ours = {
        name.removeprefix("text."): tensor
        for name, tensor in tensors.items()
        if not name.endswith("attn_mask")  # a constant that old versions stored
    }
    return Weights(source, "state dict", ours, model)


def read_folder(folder: Path, arch: ModelConfig | None) -> Weights:
    """Read a folder in this format; `arch` takes the place of its architecture.

    Raises:
        WeightsError: a file is missing or damaged, or the architecture is not supported.
    """
    values = read_json(folder / CONFIG)
    model = arch or _architecture(folder / CONFIG, values.get("model_cfg"))
    file = find_file(folder, FILES)
    if file is None:
        raise WeightsError(f"{folder}: has {CONFIG}, but none of {', '.join(FILES)}")
    tensors, unexpected = read_state_dict(file)
    weights = from_state_dict(folder, tensors, model)
    preprocess = _preprocess(folder / CONFIG, values.get("preprocess_cfg"), model)
    return replace(weights, format="open_clip", preprocess=preprocess, unexpected=unexpected)


def read_preprocess(folder: Path) -> Preprocess:
    """The preprocessing of a folder in this format.

    Raises:
        WeightsError: it is damaged, or not supported.
    """
    values = read_json(folder / CONFIG)
    model = _architecture(folder / CONFIG, values.get("model_cfg"))
    return _preprocess(folder / CONFIG, values.get("preprocess_cfg"), model)


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokeniser of a folder in this format; None: CLIP's.

    Raises:
        WeightsError: it is damaged, or not supported.
    """
    try:
        text = dict(read_json(folder / CONFIG)["model_cfg"]["text_cfg"])
    except MALFORMED as error:
        raise WeightsError(f"{folder / CONFIG}: cannot be read: {error!r}") from None
    return tokenizers.read_open_clip(folder, text)


def write(folder: Path, weights: Weights, model: ModelConfig, preprocess: Preprocess) -> None:
    """Write a folder for open_clip's `local-dir:`.

    Raises:
        WeightsError: open_clip has no equivalent of something in the architecture.
    """
    if model.patch_bias:
        raise WeightsError(f"{weights.source}: open_clip has no bias in its patch embedding")
    preprocess_cfg = _preprocess_cfg(weights.source, preprocess)
    folder.mkdir(parents=True, exist_ok=True)
    vision: dict[str, Any] = {
        theirs: getattr(model, ours)
        for theirs, ours in _VISION.items()
        if getattr(model, ours) is not None
    }
    if isinstance(model.vision_layers, int):
        vision["head_width"] = model.vision_width // model.attention_heads
        vision["no_ln_pre"] = not model.pre_norm
    else:
        vision = {k: vision[k] for k in ("layers", "width", "image_size")} | {"patch_size": None}
        vision["head_width"] = 32 * model.vision_width // model.attention_heads
    text: dict[str, Any] = {theirs: getattr(model, ours) for theirs, ours in _TEXT.items()}
    text["no_causal_mask"] = not model.transformer_causal
    if model.transformer_eos_id is not None:
        text["eos_id"] = model.transformer_eos_id
    if model.activation == "gelu_tanh":
        vision["act_kwargs"] = text["act_kwargs"] = {"approximate": "tanh"}
    facts = {
        "model_cfg": {
            "embed_dim": model.embed_dim,
            "quick_gelu": model.activation == "quick_gelu",
            **({"init_logit_bias": -10} if model.logit_bias else {}),
            "vision_cfg": vision,
            "text_cfg": text,
        },
        "preprocess_cfg": preprocess_cfg,
    }
    (folder / CONFIG).write_text(json.dumps(facts, indent=1) + "\n")
    tensors = {name: tensor.contiguous() for name, tensor in weights.tensors.items()}
    save_file(tensors, folder / FILES[0], {"format": "pt"})


def _architecture(where: Path, values: Any) -> ModelConfig:
    try:
        return architecture(values)
    except ConfigError as error:
        raise WeightsError(f"{where}: {error}") from None


def is_architecture(values: Any) -> bool:
    """Whether these are open_clip's settings of a model."""
    return isinstance(values, dict) and {"vision_cfg", "text_cfg"} <= values.keys()


def architecture(values: Any) -> ModelConfig:
    """The architecture of open_clip's settings: embed_dim, vision_cfg, text_cfg, ...

    Raises:
        ConfigError: they are not such settings, or a field's value is not supported; names it.
    """
    try:
        _check_fields("model_cfg", values)
        vision, text = (_DEFAULTS[name] | _check_fields(name, values[name]) for name in _DEFAULTS)
        arch: dict[str, Any] = {"embed_dim": values["embed_dim"], "activation": _activation(values)}
        arch |= {ours: vision[theirs] for theirs, ours in _VISION.items() if theirs in vision}
        arch |= {ours: text[theirs] for theirs, ours in _TEXT.items() if theirs in text}
        arch["image_resolution"] = square_side("image_size", vision["image_size"])
        is_resnet = isinstance(vision["layers"], list | tuple)
        arch["vision_patch_size"] = (
            None if is_resnet else square_side("patch_size", vision["patch_size"])
        )
        width = arch["vision_width"] * (32 if is_resnet else 1)
        arch["vision_heads"] = width // vision["head_width"]
        arch["pre_norm"] = not vision["no_ln_pre"]
        arch["transformer_causal"] = not text["no_causal_mask"]
        arch["transformer_eos_id"] = text["eos_id"] if text.get("pool_type") == "eos" else None
        arch["logit_bias"] = values.get("init_logit_bias") is not None
        return parse(ModelConfig, arch, where="model")
    except MALFORMED as error:
        raise ConfigError(f"not a supported architecture: {error}") from None


def _check_fields(name: str, values: Any) -> dict[str, Any]:
    """The fields of a section; one that leanclip does not have may be off: null, false, 0 or empty.

    Raises:
        ValueError: a field has a value that is not supported.
    """
    values, used = dict(values), {"vision_cfg": _VISION, "text_cfg": _TEXT}.get(name, {})
    known = {*used, *_DEFAULTS.get(name, ()), *_UNUSED[name].split()}
    for field, value in values.items():
        if field not in known and value and value not in _SUPPORTED.get(field, ()):
            raise ValueError(f"{name}.{field}: {value!r} is not supported")
    return values


def _activation(values: dict[str, Any]) -> str:
    if values.get("quick_gelu", False):
        return "quick_gelu"
    options = {
        json.dumps(values[name].get("act_kwargs") or None, sort_keys=True) for name in _DEFAULTS
    }
    known = {'{"approximate": "tanh"}': "gelu_tanh", '{"approximate": "none"}': "gelu"}
    known["null"] = "gelu"
    if len(options) == 1 and options <= known.keys():
        return known[options.pop()]
    raise ValueError(f"act_kwargs: {' and '.join(sorted(options))} is not supported")


def _preprocess(where: Path, values: Any, model: ModelConfig) -> Preprocess:
    """open_clip's `preprocess_cfg`; null is a default, and the size is always the model's.

    Raises:
        WeightsError: a value or a field is not one of open_clip's.
    """
    try:
        given = {name: value for name, value in dict(values or {}).items() if value is not None}
        unknown = given.keys() - {"size", "mode", "mean", "std", *_PREPROCESS.values()}
        if unknown:
            raise ValueError(f"{min(unknown)}: {given[min(unknown)]!r} is not supported")
        if given.get("mode", "RGB") != "RGB":
            raise ValueError(f"mode: {given['mode']!r} is not RGB")
        if given.get("interpolation") == "random":  # of training; open_clip evaluates so
            given["interpolation"] = "bicubic"
        if given.get("interpolation", "bicubic") not in ("bicubic", "bilinear"):
            raise ValueError(f"interpolation: {given['interpolation']!r} is not open_clip's")
        if given.get("resize_mode", "shortest") not in ("shortest", "longest", "squash"):
            raise ValueError(f"resize_mode: {given['resize_mode']!r} is not open_clip's")
        options = {ours: given[theirs] for ours, theirs in _PREPROCESS.items() if theirs in given}
        mean, std = (
            rgb_triple(given.get("mean", CLIP_MEAN), "mean"),
            rgb_triple(given.get("std", CLIP_STD), "std"),
        )
        if not all(std):
            raise ValueError(f"std: {std} has a zero")
        if type(options.get("fill", 0)) is not int:
            raise ValueError(f"fill_color: {options['fill']!r} is not one grey level")
        return Preprocess(model.image_resolution, mean, std, **options)
    except MALFORMED as error:
        raise WeightsError(f"{where}: preprocess_cfg: {error}") from None


def _preprocess_cfg(source: Path, preprocess: Preprocess) -> dict[str, Any]:
    """The `preprocess_cfg` of `open_clip_config.json`.

    Raises:
        WeightsError: open_clip has no equivalent.
    """
    if (
        preprocess.resize == "none"
        or preprocess.interpolation not in ("bicubic", "bilinear")
        or set(preprocess.sides) != {preprocess.resolution}
    ):
        raise WeightsError(
            f"{source}: open_clip has no preprocessing with resize {preprocess.resize}, size "
            f"{preprocess.size}, interpolation {preprocess.interpolation}"
        )
    options = {theirs: getattr(preprocess, ours) for ours, theirs in _PREPROCESS.items()}
    rest = {"mean": preprocess.mean, "std": preprocess.std, "size": preprocess.resolution}
    return rest | options
