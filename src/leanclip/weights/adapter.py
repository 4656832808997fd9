"""LoRA adapters in PEFT's folders, merged into the weights of their base model on reading.

    adapter_config.json, adapter_model.safetensors; base -> W + scale * B A -> Weights

The names are those of Hugging Face's class, whatever form the base is in: FOLDER#BASE names the
base, otherwise adapter_config.json does.

Shapes: R rank.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from leanclip.errors import WeightsError
from leanclip.weights.files import MALFORMED, find_file, read_json
from leanclip.weights.hub import locate
from leanclip.weights.huggingface_config import family_of
from leanclip.weights.names import to_ours, to_theirs
from leanclip.weights.state_dict import read_tensors
from leanclip.weights.weights import Weights

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")

_USED = (
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    "init_lora_weights",
)
_WITHOUT_EFFECT = (  # on the merged weights: of training, or of which layers the tensors are
    *("base_model_name_or_path", "base_model_class", "parent_library", "revision", "task_type"),
    *("peft_version", "inference_mode", "lora_dropout", "auto_mapping", "bias", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("runtime_config", "megatron_core", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "qalora_group_size", "ensure_weight_tying", "arrow_config"),
    "fan_in_fan_out",  # PEFT turns it off for nn.Linear, which all layers of these models are
)
# Others change the base model before training, from which the merged weights differ.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_PREFIX = re.compile(r"(?:base_model\.)?(?:model\.)?(?=\w+_model\.|\w+_projection\.|logit_)")
_WRAPPER = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")
_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")


def is_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / CONFIG).is_file()


def base_of(folder: Path, given: str | None) -> Path:
    """The file or folder of an adapter's base model, which may be given.

    Raises:
        WeightsError: there is no such model, it cannot be fetched, or is an adapter itself.
    """
    name = given or read_json(folder / CONFIG).get("base_model_name_or_path")
    if given is None and (folder / "config.json").is_file():
        return folder  # both in one folder, as transformers reads it
    where = f"{folder / CONFIG}: base_model_name_or_path: {name!r}"
    hint = f"name the base model: {folder}#BASE"
    if not name or not isinstance(name, str):
        raise WeightsError(f"{where} is no model; {hint}")
    try:
        path = locate(name)
    except WeightsError as error:
        raise WeightsError(f"{where}: {error}; {hint}") from None
    if is_folder(path):
        raise WeightsError(f"{where} is an adapter itself; merge it first: leanclip convert")
    return path


def read_folder(folder: Path, base: Weights) -> Weights:
    """The weights of a base model with an adapter merged into them.

    Raises:
        WeightsError: a file is missing or damaged, a setting is not supported, or the adapter is
            of another model; names it.
    """
    values = read_json(folder / CONFIG)
    file = find_file(folder, FILES)
    if file is None:
        raise WeightsError(f"{folder}: has {CONFIG}, but none of {', '.join(FILES)}")
    if base.model is None:
        raise WeightsError(
            f"{base.source}: does not contain its architecture, which an adapter needs; name it "
            f"with --arch"
        )
    try:
        _check_settings(values)
        family = family_of(base.model)
        theirs = to_theirs(base.tensors, family.rules)
        merged = _merge(theirs, read_tensors(file), lambda layer: _scale(values, layer))
    except KeyError as error:
        raise WeightsError(f"{folder}: its base has {error}, for which PEFT has no name") from None
    except MALFORMED as error:
        raise WeightsError(f"{folder / CONFIG}: {error}") from None
    return replace(base, source=folder, tensors=to_ours(merged, family.rules))


def _check_settings(values: Mapping[str, Any]) -> None:
    kind, init = values.get("peft_type"), values.get("init_lora_weights", True)
    if kind != "LORA":
        raise ValueError(f"peft_type: {kind} is not supported, only LORA")
    for name, value in values.items():  # off: null, false, 0 or empty
        if name not in (*_USED, *_WITHOUT_EFFECT) and value:
            raise ValueError(f"{name}: {value!r} is not supported")
    if not any(init is known or init == known for known in _INITS):
        raise ValueError(
            f"init_lora_weights: {init!r} changes the base model; export the adapter for the "
            f"unchanged one with PEFT's path_initial_model_for_weight_conversion"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = values.get(name) or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{name}: {patterns!r} does not name layers")
        for pattern in patterns:
            if not re.fullmatch(r"\^?[\w.]+", pattern):  # others can take for ever
                raise ValueError(f"{name}: {pattern!r} is not the name of a layer")


def _scale(values: Mapping[str, Any], layer: str) -> tuple[float, int]:
    """The factor of a layer's product, and its rank."""
    found = {}
    for name, default in (("rank_pattern", values.get("r", 8)), ("alpha_pattern", None)):
        patterns = values.get(name) or {}
        if name == "alpha_pattern":
            default = values.get("lora_alpha", 8)
        matching = (value for key, value in patterns.items() if _matches(key, layer))
        found[name] = next(matching, default)
    rank, alpha = found.values()
    if type(rank) is not int or rank < 1:
        raise ValueError(f"r: {rank!r} of {layer} is not a rank")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise ValueError(f"lora_alpha: {alpha!r} of {layer} is not a number")
    return alpha / (math.sqrt(rank) if values.get("use_rslora") else rank), rank


def _matches(pattern: str, layer: str) -> bool:
    if pattern.startswith("^"):
        return layer == pattern[1:]
    return f".{layer}".endswith(f".{pattern}")


def _merge(
    base: dict[str, torch.Tensor],
    adapter: Mapping[str, torch.Tensor],
    scale: Callable[[str], tuple[float, int]],
) -> dict[str, torch.Tensor]:
    """A base's tensors with those of an adapter, both by Hugging Face's names."""
    merged, factors = dict(base), {}
    for name, tensor in adapter.items():
        own = _WRAPPER.sub("", _PREFIX.sub("", name, count=1))
        if (match := _FACTOR.fullmatch(own)) is not None:
            layer, embedding, factor = match.groups()
            factors.setdefault((layer, bool(embedding)), {})[factor] = tensor
        elif own in base and base[own].shape == tensor.shape:  # a bias, or a module saved whole
            merged[own] = tensor.to(base[own].dtype)
        else:
            raise ValueError(f"the adapter's {name} {tuple(tensor.shape)} is not the base model's")
    for (layer, is_embedding), both in factors.items():
        name = f"{layer}.weight"
        if both.keys() != {"A", "B"} or name not in base:
            raise ValueError(f"the adapter's {layer} is not a layer of the base model's, or a half")
        factor, rank = scale(layer)
        a, b = both["A"].float(), both["B"].float()  # (R, in), (out, R)
        if a.shape[0] != rank or b.shape[1:2] != (rank,):
            raise ValueError(f"r: {rank}, the adapter has rank {a.shape[0]} in {layer}")
        delta = b.flatten(1) @ a.flatten(1)  # (out, in), of a convolution (out, in * k * k)
        weight, delta = merged[name], factor * (delta.t() if is_embedding else delta)
        if delta.numel() != weight.numel() or len(delta) != len(weight):
            raise ValueError(f"the adapter's {layer} does not fit {tuple(weight.shape)}")
        merged[name] = (weight.float() + delta.reshape(weight.shape)).to(weight.dtype)
    return merged
