"""OpenAI's published weights: a TorchScript archive, or the state dict that was in it.

Three numbers beside the tensors (`input_resolution`, `context_length`, `vocab_size`) identify the
format. It implies QuickGELU and heads of 64 channels.

Long-CLIP's (arXiv 2403.15378) are the same with two tables of positions for longer texts.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from leanclip.config.model import ModelConfig
from leanclip.errors import WeightsError
from leanclip.preprocess.images import Preprocess
from leanclip.weights import pe_core
from leanclip.weights.weights import INVISIBLE, Weights, check_openais, infer_architecture

MARKS = ("input_resolution", "context_length", "vocab_size")
LONG = "positional_embedding_res"  # Long-CLIP's second table
_KEPT = 20  # positions that Long-CLIP takes from the first table


def is_state_dict(names: Collection[str]) -> bool:
    """Whether tensors have this format's three numbers beside them, or are Long-CLIP's."""
    return MARKS[0] in names or LONG in names


def from_state_dict(
    source: Path, tensors: Mapping[str, torch.Tensor], model: ModelConfig | None
) -> Weights:
    """Weights without the three numbers and the causal mask; `model` is inferred if not given.

    Raises:
        WeightsError: they are not CLIP's tensors.
    """
    tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in MARKS and not name.endswith("attn_mask")
    }
    if LONG in tensors:
        tensors = _with_long_positions(source, tensors)
    model = model or infer_architecture(tensors, source=source, activation="quick_gelu")
    return Weights(source, "openai", tensors, model)


def _with_long_positions(
    source: Path, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Long-CLIP's tensors with one table of positions, the sum of both under their masks.

    Raises:
        WeightsError: the tables do not belong together.
    """
    rest = dict(tensors)
    long, first = rest.pop(LONG), rest.get("positional_embedding")
    if first is None or first.shape != long.shape or long.ndim != 2 or len(long) <= _KEPT:
        there = None if first is None else tuple(first.shape)
        raise WeightsError(
            f"{source}: not Long-CLIP's tensors: positional_embedding {there}, "
            f"{LONG} {tuple(long.shape)}"
        )
    rest["positional_embedding"] = torch.cat([first[:_KEPT], long[_KEPT:]])  # (L, D)
    return rest


def write(file: Path, weights: Weights, model: ModelConfig, preprocess: Preprocess) -> None:
    """Write a state dict for OpenAI's `build_model`, with the three numbers, by torch.save.

    A model with PE-Core's pooling is written as its own code has it.

    Raises:
        WeightsError: the format has no equivalent of something in the architecture.
    """
    if pe_core.is_state_dict(weights.tensors):
        pe_core.write(file, weights, model)
        return
    check_openais(weights, model, "OpenAI's format")
    implied = infer_architecture(weights.tensors, source=weights.source, activation="quick_gelu")
    if implied is None:
        raise WeightsError(f"{weights.source}: OpenAI's format implies heads of 64 channels")
    for name in (*INVISIBLE, "pre_norm", "patch_bias"):
        has = getattr(model, name)
        wants = {"pre_norm": True, "patch_bias": False}.get(name, getattr(implied, name))
        if has != wants:
            name = INVISIBLE.get(name, name)
            has, wants = (one[0] if isinstance(one, tuple) else one for one in (has, wants))
            raise WeightsError(
                f"{weights.source}: OpenAI's format implies {name} {wants}, this model has {has}"
            )
    sizes = (model.image_resolution, model.context_length, model.vocab_size)
    numbers = {name: torch.tensor(value) for name, value in zip(MARKS, sizes, strict=True)}
    torch.save(dict(weights.tensors) | numbers, file)
