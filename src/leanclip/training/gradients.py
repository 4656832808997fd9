"""Norms over many tensors, including parameters sharded over the ranks.

model -> parameters by tower -> norms of gradients, parameters and updates
"""

from collections.abc import Sequence

import torch
from torch import nn

from leanclip.distributed.collectives import sum_over_ranks
from leanclip.model import CLIP
from leanclip.model.parameters import SCALARS, is_shard, local


def total_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The norm () over all of the tensors, equal on every rank."""
    sharded = [tensor.to_local() for tensor in tensors if is_shard(tensor)]
    whole = [tensor for tensor in tensors if not is_shard(tensor)]
    norm = nn.utils.get_total_norm(whole)
    if not sharded:
        return norm
    square = sum_over_ranks(nn.utils.get_total_norm(sharded).square())
    return (square + norm.to(square.device).square()).sqrt()


def clip_(gradients: Sequence[torch.Tensor], norm: torch.Tensor, max_norm: float) -> None:
    """Scale gradients, whose norm is given, down to `max_norm` if it is larger.

    As `torch.nn.utils.clip_grads_with_norm_`, which cannot mix sharded and whole tensors.
    """
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    shards = [local(gradient) for gradient in gradients]
    torch._foreach_mul_(shards, factor)  # pyright: ignore[reportPrivateImportUsage]


class StepNorms:
    """The norms of one step by tower: created before the optimiser's step, read after it.

    Keeps a copy of the parameters in between.
    """

    def __init__(self, model: CLIP) -> None:
        self._parameters: dict[str, list[nn.Parameter]] = {"image": [], "text": []}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name not in SCALARS:
                tower = "image" if name.startswith("visual.") else "text"
                self._parameters[tower].append(parameter)
        self._before = {k: [p.detach().clone() for p in v] for k, v in self._parameters.items()}
        self._gradients = {
            tower: total_norm([p.grad for p in parameters if p.grad is not None])
            for tower, parameters in self._parameters.items()
        }

    @torch.no_grad()
    def after_step(self) -> dict[str, torch.Tensor]:
        """`gradient_norm/image`, `parameter_norm/text`, `update_norm/image` and so on, each ()."""
        norms = {}
        for tower, parameters in self._parameters.items():
            norms[f"gradient_norm/{tower}"] = self._gradients[tower]
            norms[f"parameter_norm/{tower}"] = total_norm(parameters)
            before = self._before[tower]
            for old, parameter in zip(before, parameters, strict=True):
                local(old).sub_(local(parameter))
            norms[f"update_norm/{tower}"] = total_norm(before)
        self._before.clear()
        return norms
