"""Weights in memory: tensors under OpenAI's names, checked against and loaded into a model.

    tensors, architecture, preprocessing -> positions resized to the model's -> model

Shapes: n patches, D width, L context length.
"""

import hashlib
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from leanclip.config.model import ModelConfig
from leanclip.config.sections import parse, to_plain
from leanclip.errors import ConfigError, WeightsError
from leanclip.model import CLIP
from leanclip.model.skip_init import meta_device
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.text import Tokenizer
from leanclip.weights.state_dict import named

log = logging.getLogger("leanclip")

VISION_POSITIONS = ("visual.positional_embedding", "visual.attnpool.positional_embedding")
TEXT_POSITIONS = "positional_embedding"
_MAX_GROWTH = 10  # of an architecture's parameters over those of its tensors
INVISIBLE = {  # settings that no tensor's shape or name shows, and how they are named to a user
    "activations": "activation",
    "attention_heads": "vision_heads",
    "pool_heads": "vision_pool_heads",
    "transformer_heads": "transformer_heads",
    **{
        name: name
        for name in (
            *("vision_norm_eps", "vision_pool", "vision_norm_after_pool", "vision_positions"),
            "vision_rotary_grid",
            *("transformer_norm_eps", "transformer_pool", "transformer_eos_id"),
            *("transformer_causal", "transformer_pad_id", "transformer_padding_mask"),
            *("transformer_post_norm", "transformer_first_position"),
        )
    },
}


@dataclass(frozen=True)
class Weights:
    """Tensors by OpenAI's names, with their architecture and preprocessing where known."""

    source: Path
    format: str  # "leanclip", "openai", "pe-core", "open_clip", "hf", "passl", or "state dict"
    tensors: dict[str, torch.Tensor]
    model: ModelConfig | None = None  # None: the source does not determine it
    preprocess: Preprocess | None = None  # default: OpenAI's, at the model's resolution
    tokenizer: Tokenizer | None = None  # None: CLIP's
    missing: tuple[str, ...] = ()  # tensors that the format never has; they become zeros
    notes: tuple[str, ...] = ()  # logged as warnings when they are loaded
    unexpected: tuple[str, ...] = ()  # what else the source has besides the model's tensors

    def __post_init__(self) -> None:
        if self.model is not None and self.preprocess is None:
            object.__setattr__(self, "preprocess", Preprocess(self.model.image_resolution))


def load_into(model: CLIP, weights: Weights, *, partial: bool = False) -> list[str]:
    """Copy the tensors into a model, each to its parameter's type; return the missing keys.

    The model gets the tokeniser of the weights.

    Positional embeddings of another size are resized with a warning: a vision tower's grid by
    bicubic interpolation with antialiasing, a text tower's by cutting it, or by keeping the
    model's own values beyond its end. With `partial`, missing and unexpected keys are logged and
    the model's own values stay.

    Raises:
        WeightsError: keys are missing or unexpected, a shape differs, or the weights have another
            activation, pooling or number of heads; names the keys or the setting.
    """
    if weights.model is not None:
        _check_invisible(weights, weights.model, model.config)
    if weights.model is None:
        log.warning(
            "%s: its activation is unknown; the model's is assumed, %s",
            weights.source,
            model.config.activation,
        )
    given, problems = _compare(weights, model.state_dict())
    if not partial or problems["shapes differ"]:
        _refuse(weights, problems)
    for what, keys in problems.items():
        if keys:
            log.warning("%s: %s: %s", weights.source, what, ", ".join(keys))
    for note in weights.notes:
        log.warning("%s: %s", weights.source, note)
    model.load_state_dict(given, strict=not partial)
    if weights.tokenizer is not None:
        model.tokenizer = weights.tokenizer.at(model.config.context_length)
    return problems["missing keys"]


def _check_invisible(weights: Weights, there: ModelConfig, here: ModelConfig) -> None:
    """Compare the settings that no tensor shows."""
    for name, setting in INVISIBLE.items():
        old, new = getattr(there, name), getattr(here, name)
        if old == new:
            continue
        if isinstance(old, tuple) and isinstance(new, tuple):  # of two towers
            both = ("vision_activation", "transformer_activation")
            if len({*old}) > 1 or len({*new}) > 1:
                setting, old, new = next(
                    (one, a, b) for one, a, b in zip(both, old, new, strict=True) if a != b
                )
            else:
                old, new = old[0], new[0]
        raise WeightsError(
            f"{weights.source}: made with {setting} {old}, the model has {new}; set "
            f"model.{setting}={old}, or name the architecture of the weights with --arch"
        )


def check_fits(weights: Weights, model: ModelConfig, *, is_exact: bool = False) -> None:
    """Check that the tensors are all those of an architecture, without building it.

    With `is_exact` positional embeddings too must have its sizes; else they may be resized.

    Raises:
        WeightsError: as `load_into` and `check_shapes`.
    """
    own = check_shapes(weights, model)
    _refuse(weights, _compare(weights, own, fits=not is_exact)[1])


def _compare(
    weights: Weights, own: Mapping[str, torch.Tensor], *, fits: bool = True
) -> tuple[dict[str, torch.Tensor], dict[str, list[str]]]:
    """The tensors for a model that has `own`, and what does not fit, by kind."""
    given = {
        name: _fit(name, tensor, own[name], weights.source) if fits and name in own else tensor
        for name, tensor in weights.tensors.items()
    }
    given |= {name: torch.zeros_like(own[name]) for name in weights.missing if name in own}
    for name, tensor in own.items():  # a counter of steps, which not every format has
        if name.endswith("num_batches_tracked"):
            given.setdefault(name, tensor)
    differing = [
        f"{name} {tuple(given[name].shape)} there, {tuple(own[name].shape)} in the model"
        for name in own.keys() & given.keys()
        if own[name].shape != given[name].shape
    ]
    return given, {
        "shapes differ": sorted(differing),
        "missing keys": sorted(own.keys() - given.keys()),
        "unexpected keys": sorted(given.keys() - own.keys()),
    }


def _refuse(weights: Weights, problems: Mapping[str, list[str]]) -> None:
    if any(problems.values()):
        found = [f"{what}: {named(keys)}" for what, keys in problems.items() if keys]
        beside = (
            f"; besides the model it has: {named(weights.unexpected)}" if weights.unexpected else ""
        )
        raise WeightsError(f"{weights.source}: {'; '.join(found)}{beside}")


def infer_architecture(
    tensors: Mapping[str, torch.Tensor],
    *,
    source: Path,
    activation: str,
    settings: Mapping[str, Any] | None = None,
) -> ModelConfig | None:
    """The architecture that tensors of OpenAI's names have, with heads of 64 channels.

    Tensors determine every size, but neither the activation nor the number of heads. None where
    heads of 64 channels do not fit. `settings` are others that they do not show.

    Raises:
        WeightsError: they are not CLIP's.
    """
    try:
        text_width = tensors["ln_final.weight"].shape[0]
        arch: dict[str, Any] = {
            "embed_dim": tensors["text_projection"].shape[1],
            "context_length": tensors[TEXT_POSITIONS].shape[0],
            "vocab_size": tensors["token_embedding.weight"].shape[0],
            "transformer_width": text_width,
            "transformer_heads": text_width // 64,
            "transformer_layers": count_blocks(tensors, "transformer"),
            "transformer_mlp_ratio": _mlp_ratio(tensors, "transformer", text_width),
            "activation": activation,
        }
        arch |= _vision_vit(tensors) if "visual.proj" in tensors else _vision_resnet(tensors)
        return parse(ModelConfig, arch | dict(settings or {}), where="its tensors")
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise WeightsError(f"{source}: not CLIP's tensors: {error} is missing or odd") from None
    except ConfigError:
        return None


def count_blocks(tensors: Mapping[str, torch.Tensor], tower: str) -> int:
    """The number of blocks of a tower, by the names of its tensors."""
    return _count(tensors, rf"{re.escape(tower)}\.resblocks\.(\d+)\.")


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of tensors in the order of their names: name, type, shape, little-endian bytes.

    That of a model's `state_dict()` identifies its weights, whatever format they were read from.
    """
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def mlp_ratio(width: int, hidden: int) -> float:
    """The ratio of a hidden width to a width, such that int(width * ratio) is the hidden width."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def square_side(name: str, value: Any) -> Any:
    """The side of a square, given as a number or as (height, width).

    Raises:
        ValueError: it is not a square.
    """
    sides = value if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2 or sides[0] != sides[1]:
        raise ValueError(f"{name}: {value} is not a square, only squares are supported")
    return sides[0]


def check_openais(weights: Weights, model: ModelConfig, format: str) -> None:
    """Check that a format which has only OpenAI's settings can hold a model.

    Raises:
        WeightsError: it cannot; names the first setting.
    """
    for name in model.extensions:
        raise WeightsError(
            f"{weights.source}: {format} has no {name}, which is {getattr(model, name)} in this "
            f"model"
        )


def check_shapes(weights: Weights, model: ModelConfig) -> dict[str, torch.Tensor]:
    """Compare tensors with an architecture before building it; return its tensors, without values.

    Positional embeddings may have another size.

    Raises:
        WeightsError: a shape differs; names the first. Or the architecture has so many more
            parameters that building it might fill the memory.
    """
    try:
        with meta_device():
            expected = CLIP(**to_plain(model)).state_dict()
    except (RuntimeError, OverflowError):  # a tensor of more bytes than there are numbers for
        raise WeightsError(
            f"{weights.source}: the sizes of its architecture are out of range"
        ) from None
    for name, tensor in weights.tensors.items():
        fits = name.endswith("positional_embedding") or name not in expected
        if not fits and tensor.shape != expected[name].shape:
            raise WeightsError(
                f"{weights.source}: shapes differ: {name} {tuple(tensor.shape)} there, "
                f"{tuple(expected[name].shape)} in the architecture"
            )
    wanted = sum(tensor.numel() for tensor in expected.values())
    present = sum(tensor.numel() for tensor in weights.tensors.values())
    if wanted > _MAX_GROWTH * present + 10**7:
        raise WeightsError(
            f"{weights.source}: the architecture has {wanted:,} parameters, the tensors "
            f"{present:,}; they do not belong together"
        )
    return expected


def _vision_vit(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    width, _, patch_size, _ = tensors["visual.conv1.weight"].shape
    class_token = "visual.class_embedding" in tensors
    side = math.isqrt(tensors["visual.positional_embedding"].shape[0] - class_token)
    return {
        "image_resolution": side * patch_size,
        "vision_class_token": class_token,
        "vision_layers": count_blocks(tensors, "visual.transformer"),
        "vision_width": width,
        "vision_patch_size": patch_size,
        "vision_mlp_ratio": _mlp_ratio(tensors, "visual.transformer", width),
        "pre_norm": "visual.ln_pre.weight" in tensors,
        "patch_bias": "visual.conv1.bias" in tensors,
    }


def _vision_resnet(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    positions = tensors.get(VISION_POSITIONS[1])
    side = 7 if positions is None else math.isqrt(positions.shape[0] - 1)  # 7: of 224 pixels
    return {
        "image_resolution": 32 * side,
        "vision_layers": [_count(tensors, rf"visual\.layer{i}\.(\d+)\.") for i in (1, 2, 3, 4)],
        "vision_width": tensors["visual.layer1.0.conv1.weight"].shape[0],
    }


def _count(tensors: Mapping[str, torch.Tensor], pattern: str) -> int:
    """The number of different values of the pattern's group among the names."""
    return len({match[1] for name in tensors if (match := re.match(pattern, name))})


def _mlp_ratio(tensors: Mapping[str, torch.Tensor], tower: str, width: int) -> float:
    return mlp_ratio(width, tensors[f"{tower}.resblocks.0.mlp.c_fc.weight"].shape[0])


def _fit(name: str, tensor: torch.Tensor, own: torch.Tensor, source: Path) -> torch.Tensor:
    """Positional embeddings resized to the model's; other tensors unchanged."""
    if tensor.shape == own.shape or tensor.ndim != 2 or tensor.shape[1] != own.shape[1]:
        return tensor
    there, here = len(tensor), len(own)
    if name == TEXT_POSITIONS:
        what = "cut" if there > here else f"kept, with the model's own from the {there + 1}th on"
        log.warning("%s: text positions %d -> %d: %s", source, there, here, what)
        return torch.cat([tensor[:here].to(own), own[there:]])  # (L, D)
    for first in (1, 0):  # with a class token or without
        if name in VISION_POSITIONS and _is_square(there - first) and _is_square(here - first):
            log.warning("%s: %s %d -> %d: resized, bicubic", source, name, there, here)
            return _resize_grid(tensor.float(), math.isqrt(here - first), first)
    return tensor


def _resize_grid(positions: torch.Tensor, side: int, count: int) -> torch.Tensor:
    """(count + n, D) -> (count + side², D): the first as they are, the others as a picture."""
    first, grid = positions[:count], positions[count:]
    old = math.isqrt(len(grid))
    grid = grid.T.reshape(1, -1, old, old)  # (1, D, old, old)
    grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)
    return torch.cat([first, grid.flatten(2)[0].T])  # (count + side², D)


def _is_square(n: int) -> bool:
    return n > 0 and math.isqrt(n) ** 2 == n
