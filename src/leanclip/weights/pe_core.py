"""Perception Encoder's own files of PE-Core (arXiv 2504.13181): a bare state dict.

Names are OpenAI's, with `visual.attn_pool.*`. Sizes come from the tensors; the format implies the
rest: exact GELU, rotary positions, heads of 64 channels, squashed images.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from leanclip.config.model import ModelConfig
from leanclip.errors import WeightsError
from leanclip.preprocess.images import Preprocess
from leanclip.weights.weights import Weights, infer_architecture, mlp_ratio

_PROBE = "visual.attn_pool.probe"
_NAMES = (_PROBE, "visual.proj", "visual.ln_pre.weight", "ln_final.weight", "text_projection")
_HEADS = {1536: 16}  # of the largest, by its width
_POOL_HEADS = 8
_HALF = (0.5, 0.5, 0.5)


def is_state_dict(names: Collection[str]) -> bool:
    """Whether tensors have this format's names."""
    return all(name in names for name in _NAMES) and "logit_bias" not in names


def from_state_dict(
    source: Path, tensors: Mapping[str, torch.Tensor], model: ModelConfig | None
) -> Weights:
    """Weights of tensors alone; `model` is inferred if not given.

    Raises:
        WeightsError: they are not PE-Core's tensors.
    """
    ours = {name: one for name, one in tensors.items() if not name.endswith("attn_mask")}
    model = model or _infer(source, ours)
    preprocess = None if model is None else _preprocess(model)
    return Weights(source, "pe-core", ours, model, preprocess)


def write(file: Path, weights: Weights, model: ModelConfig) -> None:
    """Write a state dict for Perception Encoder's `CLIP.load_ckpt`, by torch.save.

    Raises:
        WeightsError: the format has no equivalent of something in the architecture.
    """
    implied = _infer(weights.source, weights.tensors)
    if implied is None:
        raise WeightsError(f"{weights.source}: PE-Core's format implies heads of 64 channels")
    for name in type(model).model_fields:
        has, wants = _resolved(model, name), _resolved(implied, name)
        if has != wants:
            raise WeightsError(
                f"{weights.source}: PE-Core's format implies {name} {wants}, this model has {has}"
            )
    torch.save(dict(weights.tensors), file)


def _infer(source: Path, tensors: Mapping[str, torch.Tensor]) -> ModelConfig | None:
    probe, hidden = tensors.get(_PROBE), tensors.get("visual.attn_pool.mlp.c_fc.weight")
    if probe is None or hidden is None:
        raise WeightsError(f"{source}: not PE-Core's tensors: they have no visual.attn_pool")
    width = probe.shape[-1]
    settings = {
        "vision_heads": _HEADS.get(width),
        "vision_pool": "attn",
        "vision_pool_heads": _POOL_HEADS,
        "vision_pool_mlp_ratio": mlp_ratio(width, len(hidden)),
        "vision_positions": "rotary",
    }
    found = infer_architecture(tensors, source=source, activation="gelu", settings=settings)
    if found is not None and found.vision_pool_mlp_ratio == found.vision_mlp_ratio:
        found = found.model_copy(update={"vision_pool_mlp_ratio": None})
    return found


def _resolved(model: ModelConfig, name: str) -> object:
    """A setting, or what its absence means."""
    patch = model.vision_patch_size or 1
    defaults = {
        "vision_heads": model.attention_heads,
        "vision_pool_mlp_ratio": model.vision_mlp_ratio,
        "vision_rotary_grid": model.image_resolution // patch,
        "vision_activation": model.activations[0],
        "transformer_activation": model.activations[1],
        "transformer_positions": model.text_positions,
    }
    value = getattr(model, name)
    return defaults.get(name) if value is None else value


def _preprocess(model: ModelConfig) -> Preprocess:
    side = model.image_resolution
    return Preprocess(side, _HALF, _HALF, resize="squash", interpolation="bilinear")
