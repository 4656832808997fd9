"""open_clip's folders: `open_clip_config.json` beside the weights, under OpenAI's names.

A CustomTextCLIP puts the text tower's names under `text.`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from leanclip.config import ModelConfig
from leanclip.errors import ConfigError, WeightsError
from leanclip.images import CLIP_MEAN, CLIP_STD, Preprocess, triple
from leanclip.settings import parse
from leanclip.weights.formats import read_safetensors
from leanclip.weights.state_dict import read_json, read_torch
from leanclip.weights.weights import Weights

CONFIG = "open_clip_config.json"
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

_VISION = {  # theirs -> ours; what is not named here must have its default below
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
_HARMLESS = {"patch_dropout", "no_ln_pre", "no_causal_mask", "head_width", "act_kwargs"}
_DEFAULTS = {  # of settings that leanclip has no other choice for
    "ls_init_value": None,
    "attentional_pool": False,
    "input_patchnorm": False,
    "timm_model_name": None,
    "hf_model_name": None,
    "pos_embed_type": "learnable",
    "output_tokens": False,
    "embed_cls": False,
    "proj_bias": False,
    "proj_type": "linear",
    "pad_id": 0,
    "norm_kwargs": None,
}

_PREPROCESS = {"resize": "resize_mode", "interpolation": "interpolation", "fill": "fill_color"}


def read_folder(folder: Path, arch: ModelConfig | None) -> Weights:
    """Read a folder that holds `open_clip_config.json`.

    Raises:
        WeightsError: a file is missing or damaged, or the architecture is not one that
            leanclip has.
    """
    facts = read_json(folder / CONFIG)
    model = arch or _architecture(folder / CONFIG, facts.get("model_cfg"))
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise WeightsError(f"{folder}: has {CONFIG}, but none of {', '.join(FILES)}")
    others: tuple[str, ...] = ()
    if file.suffix == ".safetensors":
        tensors, _ = read_safetensors(file)
    else:
        tensors, others = read_torch(file)
    preprocess = _preprocess(folder / CONFIG, facts.get("preprocess_cfg"), model)
    return Weights(folder, "open_clip", flat_text(tensors), model, preprocess, others=others)


def read_preprocess(folder: Path) -> Preprocess:
    """The preprocessing of a folder that holds `open_clip_config.json`.

    Raises:
        WeightsError: it is damaged, or not open_clip's.
    """
    path = folder / CONFIG
    facts = read_json(path)
    return _preprocess(
        path, facts.get("preprocess_cfg"), _architecture(path, facts.get("model_cfg"))
    )


def flat_text(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CustomTextCLIP's names without `text.`."""
    return {
        name.removeprefix("text."): tensor
        for name, tensor in tensors.items()
        if not name.endswith("attn_mask")  # a constant that old versions stored
    }


def write(folder: Path, weights: Weights, model: ModelConfig, preprocess: Preprocess) -> None:
    """A folder that open_clip's `local-dir:` takes.

    Raises:
        WeightsError: open_clip has no place for something in the architecture.
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
    if model.activation == "gelu_tanh":
        vision["act_kwargs"] = text["act_kwargs"] = {"approximate": "tanh"}
    facts = {
        "model_cfg": {
            "embed_dim": model.embed_dim,
            "quick_gelu": model.activation == "quick_gelu",
            "vision_cfg": vision,
            "text_cfg": text,
        },
        "preprocess_cfg": preprocess_cfg,
    }
    (folder / CONFIG).write_text(json.dumps(facts, indent=1) + "\n")
    tensors = {name: tensor.contiguous() for name, tensor in weights.tensors.items()}
    save_file(tensors, folder / FILES[0], {"format": "pt"})


def _architecture(where: Path, facts: Any) -> ModelConfig:
    try:
        vision, text = dict(facts["vision_cfg"]), dict(facts["text_cfg"])
        for section in (vision, text):
            for name, value in section.items():
                known = name in _VISION or name in _TEXT or name in _HARMLESS
                if not known and (name not in _DEFAULTS or value != _DEFAULTS[name]):
                    raise WeightsError(f"{where}: {name}: {value!r} is not supported")
        if facts.get("custom_text") and facts.get("init_logit_bias") is not None:
            raise WeightsError(f"{where}: SigLIP's models are not supported")
        arch: dict[str, Any] = {"embed_dim": facts["embed_dim"], "activation": _activation(facts)}
        arch |= {ours: vision[theirs] for theirs, ours in _VISION.items() if theirs in vision}
        arch |= {ours: text[theirs] for theirs, ours in _TEXT.items() if theirs in text}
        arch.setdefault("transformer_layers", 12)
        width = arch["vision_width"] * (32 if isinstance(arch["vision_layers"], list) else 1)
        arch["vision_heads"] = width // vision.get("head_width", 64)
        arch["pre_norm"] = not vision.get("no_ln_pre", False)
        arch["transformer_causal"] = not text.get("no_causal_mask", False)
        return parse(ModelConfig, arch, where=str(where))
    except (KeyError, TypeError, AttributeError, ValueError, ConfigError) as error:
        raise WeightsError(f"{where}: not an architecture that leanclip has: {error}") from None


def _activation(facts: dict[str, Any]) -> str:
    if facts.get("quick_gelu", False):
        return "quick_gelu"
    options = {
        json.dumps(facts[name].get("act_kwargs"), sort_keys=True)
        for name in ("vision_cfg", "text_cfg")
    }
    if len(options) == 1 and options <= {"null", "{}"}:
        return "gelu"
    if options == {'{"approximate": "tanh"}'}:
        return "gelu_tanh"
    raise ValueError(f"act_kwargs {sorted(options)}")


def _preprocess(where: Path, values: Any, model: ModelConfig) -> Preprocess:
    """open_clip's `preprocess_cfg`; null is a default, and the size is the model's in any case.

    Raises:
        WeightsError: a value that open_clip does not take, or a field that it does not have.
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
            triple(given.get("mean", CLIP_MEAN), "mean"),
            triple(given.get("std", CLIP_STD), "std"),
        )
        if not all(std):
            raise ValueError(f"std: {std} has a zero")
        if type(options.get("fill", 0)) is not int:
            raise ValueError(f"fill_color: {options['fill']!r} is not one grey level")
        return Preprocess(model.image_resolution, mean, std, **options)
    except (TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"{where}: preprocess_cfg: {error}") from None


def _preprocess_cfg(source: Path, preprocess: Preprocess) -> dict[str, Any]:
    """For `open_clip_config.json`.

    Raises:
        WeightsError: open_clip has no place for it.
    """
    if (
        preprocess.resize == "none"
        or preprocess.interpolation not in ("bicubic", "bilinear")
        or set(preprocess.sides) != {preprocess.resolution}
    ):
        raise WeightsError(
            f"{source}: open_clip cannot prepare images with resize {preprocess.resize}, size "
            f"{preprocess.size}, interpolation {preprocess.interpolation}"
        )
    options = {theirs: getattr(preprocess, ours) for ours, theirs in _PREPROCESS.items()}
    rest = {"mean": preprocess.mean, "std": preprocess.std, "size": preprocess.resolution}
    return rest | options
