"""Interpolation of two models' weights (WiSE-FT, arXiv 2109.01903)."""

import logging
from pathlib import Path

import torch

from leanclip.config.model import ModelConfig
from leanclip.config.sections import differences, to_plain
from leanclip.errors import WeightsError
from leanclip.model import CLIP
from leanclip.weights.weights import Weights, check_shapes, load_into

log = logging.getLogger("leanclip")


def interpolate(first: Weights, second: Weights, alpha: float) -> Weights:
    """(1 - alpha) * first + alpha * second, in float32; at 0 and 1 exactly the one or the other.

    Integer tensors, such as a count of batches, and the preprocessing are those of the nearer one.
    The temperature is interpolated as it is stored, as a logarithm.

    Raises:
        WeightsError: the two have different architectures, or neither contains its own.
    """
    model = first.model or second.model
    if model is None:
        raise WeightsError(
            f"neither {first.source} nor {second.source} contains its architecture; name it with "
            f"--arch"
        )
    if first.model and second.model and (differing := differences(first.model, second.model)):
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise WeightsError(
            f"{second.source}: not of the architecture of {first.source}: "
            f"{'; '.join(differing[:3])}{more}"
        )
    nearer = first if alpha < 0.5 else second
    given = [weights.preprocess for weights in (first, second) if weights.preprocess]
    if len(given) == 2 and given[0] != given[1]:
        log.warning("their preprocessing differs; that of %s is used", nearer.source)
    tokenizers = [weights.tokenizer for weights in (first, second) if weights.tokenizer]
    if len(tokenizers) == 2 and tokenizers[0] != tokenizers[1]:
        raise WeightsError(f"{second.source}: not the tokeniser of {first.source}")
    states = _state(first, model), _state(second, model)
    return Weights(
        source=Path(f"{1 - alpha:g} * {first.source} + {alpha:g} * {second.source}"),
        format="interpolation",
        tensors={
            name: interpolate_tensor(states[0][name], states[1][name], alpha) for name in states[0]
        },
        model=model,
        preprocess=nearer.preprocess or next(iter(given), None),
        tokenizer=next(iter(tokenizers), None),
    )


def _state(weights: Weights, model: ModelConfig) -> dict[str, torch.Tensor]:
    """All tensors of the architecture, in float32."""
    check_shapes(weights, model)
    clip = CLIP(**to_plain(model))
    load_into(clip, weights)
    return clip.state_dict()


def interpolate_tensor(first: torch.Tensor, second: torch.Tensor, alpha: float) -> torch.Tensor:
    """One tensor between two others; at 0 and 1 exactly the one or the other."""
    if alpha in (0, 1) or not first.is_floating_point():  # a sum would turn -0 into 0
        return first if alpha < 0.5 else second
    return (1 - alpha) * first + alpha * second
