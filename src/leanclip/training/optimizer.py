"""The optimiser's parameter groups, and its learning rates as pure functions of the step."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from leanclip.config.training import OptimizerConfig

_WITHOUT_DECAY = ("positional_embedding", "attn_pool.probe")


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, factors: Mapping[str, float] | None = None
) -> torch.optim.AdamW:
    """AdamW, whose learning rate is set before every step; `factors` as in `parameter_groups`."""
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
    """Two groups per factor: matrices with weight decay; vectors, scalars and positions without.

    The query of an attention pool is a vector, as a class token is.

    `factors` multiply the learning rate, by a parameter's name (default 1); each group has its
    own as "factor".
    """
    factors = factors or {}
    found: dict[float, tuple[list[nn.Parameter], list[nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            has_no_decay = parameter.ndim <= 1 or name.endswith(_WITHOUT_DECAY)
            found.setdefault(factors.get(name, 1.0), ([], []))[has_no_decay].append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "factor": factor}
        for factor, both in found.items()
        for parameters, decay in zip(both, (weight_decay, 0.0), strict=True)
    ]


def scaled_learning_rate(config: OptimizerConfig, global_batch: float) -> float:
    """The peak learning rate of a (mean) global batch: lr * global_batch / reference_batch."""
    if config.reference_batch is None:
        return config.learning_rate
    return config.learning_rate * global_batch / config.reference_batch


def learning_rate(step: int, *, peak: float, warmup: int, steps: int) -> float:
    """The learning rate of a step: linear warm-up from peak/warmup, then cosine decay to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
