"""The optimiser's parameter groups, and its rates as pure functions of the step."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from leanclip.config.training import OptimizerConfig


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, factors: Mapping[str, float] | None = None
) -> torch.optim.AdamW:
    """AdamW; the learning rate is set before every step from `learning_rate`.

    `factors` are those of `parameter_groups`.
    """
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay, factors),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def parameter_groups(
    model: nn.Module, weight_decay: float, factors: Mapping[str, float] | None = None
) -> list[dict]:
    """Two groups for each factor: matrices decay; vectors, scalars and positions do not.

    `factors` are on the rate, by a parameter's name; 1 where there is none. A group holds its
    own as "factor".
    """
    factors = factors or {}
    found: dict[float, tuple[list[nn.Parameter], list[nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_kept = parameter.ndim <= 1 or name.endswith("positional_embedding")
            decayed_and_kept = found.setdefault(factors.get(name, 1.0), ([], []))
            decayed_and_kept[is_kept].append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "factor": factor}
        for factor, both in found.items()
        for parameters, decay in zip(both, (weight_decay, 0.0), strict=True)
    ]


def scaled_learning_rate(config: OptimizerConfig, global_batch: int) -> float:
    """The peak rate for this global batch: lr * global_batch / reference_batch."""
    if config.reference_batch is None:
        return config.learning_rate
    return config.learning_rate * global_batch / config.reference_batch


def learning_rate(step: int, *, peak: float, warmup: int, steps: int) -> float:
    """The rate of a step: linear from peak/warmup up to the peak, then a cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
