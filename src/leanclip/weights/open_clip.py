"""open_clip's folders: `open_clip_config.json` beside the weights.

open_clip_config.json -> architecture (open_clip_config.py), preprocessing, tokeniser
architecture -> model_cfg and names (open_clip_writer.py)

open_clip's own towers have OpenAI's names; a CustomTextCLIP puts those of the text tower under
`text.`. Towers of timm and transformers have theirs (open_clip_towers.py).
"""

import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file

from leanclip.config.model import ModelConfig
from leanclip.errors import ConfigError, WeightsError
from leanclip.preprocess.images import CLIP_MEAN, CLIP_STD, Preprocess, rgb_triple
from leanclip.preprocess.text import Tokenizer
from leanclip.weights import tokenizer as tokenizers
from leanclip.weights.files import MALFORMED, find_file, read_json
from leanclip.weights.names import to_ours, to_theirs
from leanclip.weights.open_clip_config import architecture, check_towers
from leanclip.weights.open_clip_towers import READ_RULES
from leanclip.weights.open_clip_writer import form_of
from leanclip.weights.state_dict import read_state_dict
from leanclip.weights.weights import Weights, square_side

log = logging.getLogger("leanclip")
T = TypeVar("T")

CONFIG = "open_clip_config.json"
FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)

_PREPROCESS = {"resize": "resize_mode", "interpolation": "interpolation", "fill": "fill_color"}
# Constants that old versions stored.
_CONSTANTS = ("attn_mask", "embeddings.position_ids", "embeddings.token_type_ids")


def is_folder(folder: Path) -> bool:
    """Whether a folder is in this format."""
    return (folder / CONFIG).is_file()


def is_state_dict(names: Collection[str]) -> bool:
    """Whether tensors may have this format's names, which may be OpenAI's: always."""
    return True


def from_state_dict(
    source: Path, tensors: Mapping[str, torch.Tensor], model: ModelConfig | None
) -> Weights:
    """Weights of tensors alone, which do not tell their activation.

    Raises:
        WeightsError: of tensors that are one here, some are missing.
    """
    theirs = {name: one for name, one in tensors.items() if not name.endswith(_CONSTANTS)}
    return Weights(source, "state dict", to_ours(theirs, READ_RULES), model)


def read_folder(folder: Path, arch: ModelConfig | None) -> Weights:
    """Read a folder in this format; `arch` takes the place of its architecture.

    Raises:
        WeightsError: a file is missing or damaged, or the architecture is not supported.
    """
    values, where = read_json(folder / CONFIG), folder / CONFIG
    if arch is None:
        _named(where, check_towers, values.get("model_cfg"))
    file = find_file(folder, FILES)
    if file is None:
        raise WeightsError(f"{folder}: has {CONFIG}, but none of {', '.join(FILES)}")
    tensors, unexpected = read_state_dict(file)
    weights = from_state_dict(folder, tensors, arch)
    tokenizer = read_tokenizer(folder)
    model = arch or _named(where, architecture, values.get("model_cfg"), weights.tensors)
    if arch is None and tokenizer is not None and not model.transformer_padding_mask:
        pad_id = values["model_cfg"]["text_cfg"].get("pad_id", tokenizer.pad_id)
        model = model.model_copy(update={"transformer_pad_id": pad_id})
    found = dict(weights.tensors)
    if not model.transformer_pooler:  # made by AutoModel, whether it is used or not
        for name in [name for name in found if name.startswith("pooler.")]:
            del found[name]
            unexpected = (*unexpected, f"text.transformer.{name}, which its pooling does not use")
    return replace(
        weights,
        format="open_clip",
        tensors=found,
        model=model,
        preprocess=_preprocess(where, values.get("preprocess_cfg"), model.image_resolution),
        tokenizer=tokenizer,
        unexpected=unexpected,
    )


def read_preprocess(folder: Path) -> Preprocess:
    """The preprocessing of a folder in this format.

    Raises:
        WeightsError: it is damaged, or not supported.
    """
    values = read_json(folder / CONFIG)
    try:
        side = square_side("image_size", values["model_cfg"]["vision_cfg"].get("image_size", 224))
    except MALFORMED as error:
        raise WeightsError(f"{folder / CONFIG}: cannot be read: {error!r}") from None
    return _preprocess(folder / CONFIG, values.get("preprocess_cfg"), side)


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokeniser of a folder in this format; None: CLIP's.

    Raises:
        WeightsError: it is damaged, or not supported.
    """
    try:
        text = dict(read_json(folder / CONFIG)["model_cfg"]["text_cfg"])
        return tokenizers.read_open_clip(folder, text)
    except MALFORMED as error:
        raise WeightsError(f"{folder / CONFIG}: text_cfg: cannot be read: {error!r}") from None


def write(folder: Path, weights: Weights, model: ModelConfig, preprocess: Preprocess) -> None:
    """Write a folder for open_clip's `local-dir:`.

    Raises:
        WeightsError: open_clip has no equivalent of something in the architecture.
    """
    try:
        form = form_of(model)
    except ValueError as error:
        raise WeightsError(f"{weights.source}: {error}") from None
    preprocess_cfg = _preprocess_cfg(weights.source, preprocess)
    folder.mkdir(parents=True, exist_ok=True)
    for note in form.notes:
        log.warning("%s: %s", folder, note)
    model_cfg = form.model_cfg
    if weights.tokenizer is not None:
        tokenizers.write_files(folder, weights.tokenizer)
        model_cfg["text_cfg"] |= tokenizers.open_clip_settings(weights.tokenizer)
    facts = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / CONFIG).write_text(json.dumps(facts, indent=1) + "\n")
    tensors = {name: tensor.contiguous() for name, tensor in weights.tensors.items()}
    tensors = to_theirs(tensors, form.rules) if form.rules else tensors
    save_file(tensors, folder / FILES[0], {"format": "pt"})


def _named(where: Path, function: Callable[..., T], *arguments: Any) -> T:
    """What a function returns; its errors name the file."""
    try:
        return function(*arguments)
    except ConfigError as error:
        raise WeightsError(f"{where}: {error}") from None


def _preprocess(where: Path, values: Any, side: int) -> Preprocess:
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
        return Preprocess(side, mean, std, **options)
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
