"""Weights in memory, whatever they came from, and how they are put into a model.

    tensors by OpenAI's names + what the source says of them -> fit to the model's sizes -> model

Shapes: n patches or places, D width, L context length.
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
from leanclip.weights.state_dict import named

log = logging.getLogger("leanclip")

VISION_POSITIONS = ("visual.positional_embedding", "visual.attnpool.positional_embedding")
TEXT_POSITIONS = "positional_embedding"
_MAX_GROWTH = 10  # of an architecture's parameters over those of the tensors for it
INVISIBLE = (  # settings that no tensor's shape or name shows
    "activation",
    "attention_heads",
    "transformer_heads",
    "vision_pool",
    "vision_norm_after_pool",
    "transformer_pool",
    "transformer_eos_id",
    "transformer_causal",
)


@dataclass(frozen=True)
class Weights:
    """Tensors by OpenAI's names and, where the source says so, what they belong to."""

    source: Path
    format: str  # "leanclip", "openai", "open_clip", "hf", "passl", or "state dict"
    tensors: dict[str, torch.Tensor]
    model: ModelConfig | None = None  # None: the source does not say enough
    preprocess: Preprocess | None = None  # where it is not given, OpenAI's at the model's size
    missing: tuple[str, ...] = ()  # tensors that the format never holds; they become zeros
    notes: tuple[str, ...] = ()  # what a person should know
    unexpected: tuple[str, ...] = ()  # what the source holds besides tensors of the model

    def __post_init__(self) -> None:
        if self.model is not None and self.preprocess is None:
            object.__setattr__(self, "preprocess", Preprocess(self.model.image_resolution))


def load_into(model: CLIP, weights: Weights, *, partial: bool = False) -> list[str]:
    """Copy the tensors into a model, each to its parameter's type; the keys that are missing.

    Positional embeddings of another size are fitted, and the log says so: a vision tower's by
    bicubic antialiased resizing of the grid, a text tower's by cutting, or by keeping the
    model's own beyond the end. With `partial`, missing and left-over keys are listed in the log
    and the model's own values stay.

    Raises:
        WeightsError: keys are missing or left over, a shape differs, or the weights were made
            with another activation, pooling or number of heads; names the keys or the setting.
    """
    for name in INVISIBLE if weights.model is not None else ():
        there, here = getattr(weights.model, name), getattr(model.config, name)
        if there != here:
            setting = "vision_heads" if name == "attention_heads" else name
            raise WeightsError(
                f"{weights.source}: made with {setting} {there}, the model has {here}; set "
                f"model.{setting}={there}, or say with --arch what the weights are"
            )
    if weights.model is None:
        log.warning(
            "%s: does not say its activation; taken for the model's, %s",
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
    return problems["keys are missing"]


def check_fits(weights: Weights, model: ModelConfig, *, is_exact: bool = False) -> None:
    """See that the tensors are all those of an architecture; builds nothing.

    `is_exact`: positions too must be of its sizes; else they could be fitted.

    Raises:
        WeightsError: as `load_into` and `check_shapes`.
    """
    check_shapes(weights, model)
    with meta_device():
        own = CLIP(**to_plain(model)).state_dict()
    _refuse(weights, _compare(weights, own, fits=not is_exact)[1])


def _compare(
    weights: Weights, own: Mapping[str, torch.Tensor], *, fits: bool = True
) -> tuple[dict[str, torch.Tensor], dict[str, list[str]]]:
    """What a model with these tensors takes of the weights, and what does not fit."""
    given = {
        name: _fit(name, tensor, own[name], weights.source) if fits and name in own else tensor
        for name, tensor in weights.tensors.items()
    }
    given |= {name: torch.zeros_like(own[name]) for name in weights.missing if name in own}
    for name, tensor in own.items():  # a counter of steps, which not every format holds
        if name.endswith("num_batches_tracked"):
            given.setdefault(name, tensor)
    differing = [
        f"{name} {tuple(given[name].shape)} there, {tuple(own[name].shape)} in the model"
        for name in own.keys() & given.keys()
        if own[name].shape != given[name].shape
    ]
    return given, {
        "shapes differ": sorted(differing),
        "keys are missing": sorted(own.keys() - given.keys()),
        "keys are left over": sorted(given.keys() - own.keys()),
    }


def _refuse(weights: Weights, problems: Mapping[str, list[str]]) -> None:
    if any(problems.values()):
        found = [f"{what}: {named(keys)}" for what, keys in problems.items() if keys]
        beside = (
            f"; beside the model are: {named(weights.unexpected)}" if weights.unexpected else ""
        )
        raise WeightsError(f"{weights.source}: {'; '.join(found)}{beside}")


def infer_architecture(
    tensors: Mapping[str, torch.Tensor], *, source: Path, activation: str
) -> ModelConfig | None:
    """The architecture that tensors of OpenAI's names have, with heads of 64 channels.

    Tensors tell every size; not the activation, nor the number of heads. None where no heads
    of 64 channels fit: then somebody has to say what it is.

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
            "transformer_layers": _count(tensors, r"transformer\.resblocks\.(\d+)\."),
            "transformer_mlp_ratio": _mlp_ratio(tensors, "transformer", text_width),
            "activation": activation,
        }
        arch |= _vision_vit(tensors) if "visual.proj" in tensors else _vision_resnet(tensors)
        return parse(ModelConfig, arch, where="its tensors")
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise WeightsError(f"{source}: not CLIP's tensors: {error} is missing or odd") from None
    except ConfigError:
        return None


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over tensors in the order of their names: name, type, shape, and little-endian bytes.

    Of a model's `state_dict()`, which has OpenAI's names and one type whatever was read, it is
    the same for the same weights in every format.
    """
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def mlp_ratio(width: int, hidden: int) -> float:
    """A ratio that gives the hidden width back when it is multiplied and rounded down."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def square_side(name: str, value: Any) -> Any:
    """One side of a square, which may be given twice.

    Raises:
        ValueError: it is no square.
    """
    sides = value if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2 or sides[0] != sides[1]:
        raise ValueError(f"{name}: {value} is not a square, only squares are supported")
    return sides[0]


def check_shapes(weights: Weights, model: ModelConfig) -> None:
    """Compare tensors with what an architecture has, before anything is built or written.

    Positional embeddings may be of another size.

    Raises:
        WeightsError: a shape differs; names the first. Or the architecture has so many more
            parameters that building it might fill the memory.
    """
    try:
        with meta_device():
            expected = CLIP(**to_plain(model)).state_dict()
    except (RuntimeError, OverflowError):  # a tensor of more bytes than there are numbers for
        raise WeightsError(f"{weights.source}: its architecture has sizes beyond reason") from None
    for name, tensor in weights.tensors.items():
        fits = name.endswith("positional_embedding") or name not in expected
        if not fits and tensor.shape != expected[name].shape:
            raise WeightsError(
                f"{weights.source}: shapes differ: {name} {tuple(tensor.shape)} there, "
                f"{tuple(expected[name].shape)} in the architecture"
            )
    wanted = sum(tensor.numel() for tensor in expected.values())
    held = sum(tensor.numel() for tensor in weights.tensors.values())
    if wanted > _MAX_GROWTH * held + 10**7:
        raise WeightsError(
            f"{weights.source}: the architecture has {wanted:,} parameters, the tensors {held:,}; "
            f"one of the two is not of these weights"
        )


def _vision_vit(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    width, _, patch_size, _ = tensors["visual.conv1.weight"].shape
    side = math.isqrt(tensors["visual.positional_embedding"].shape[0] - 1)
    return {
        "image_resolution": side * patch_size,
        "vision_layers": _count(tensors, r"visual\.transformer\.resblocks\.(\d+)\."),
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
    """How many numbers the pattern's group takes among the names."""
    return len({match[1] for name in tensors if (match := re.match(pattern, name))})


def _mlp_ratio(tensors: Mapping[str, torch.Tensor], tower: str, width: int) -> float:
    return mlp_ratio(width, tensors[f"{tower}.resblocks.0.mlp.c_fc.weight"].shape[0])


def _fit(name: str, tensor: torch.Tensor, own: torch.Tensor, source: Path) -> torch.Tensor:
    """Positions of another size, fitted to the model's; everything else as it is."""
    if tensor.shape == own.shape or tensor.ndim != 2 or tensor.shape[1] != own.shape[1]:
        return tensor
    there, here = len(tensor), len(own)
    if name == TEXT_POSITIONS:
        what = "cut" if there > here else f"kept, with the model's own from the {there + 1}th on"
        log.warning("%s: text positions %d -> %d: %s", source, there, here, what)
        return torch.cat([tensor[:here].to(own), own[there:]])  # (L, D)
    if name in VISION_POSITIONS and _is_square(there - 1) and _is_square(here - 1):
        log.warning("%s: %s %d -> %d: resized, bicubic", source, name, there, here)
        return _resize_grid(tensor.float(), math.isqrt(here - 1))
    return tensor


def _resize_grid(positions: torch.Tensor, side: int) -> torch.Tensor:
    """(1 + n, D) -> (1 + side², D): the first as it is, the others resized as a picture."""
    first, grid = positions[:1], positions[1:]
    old = math.isqrt(len(grid))
    grid = grid.T.reshape(1, -1, old, old)  # (1, D, old, old)
    grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)
    return torch.cat([first, grid.flatten(2)[0].T])  # (1 + side², D)


def _is_square(n: int) -> bool:
    return n > 0 and math.isqrt(n) ** 2 == n
