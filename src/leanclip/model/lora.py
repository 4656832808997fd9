"""Low-rank updates of a CLIP's matrices (LoRA, arXiv 2106.09685), merged when they are written.

    weight -> weight + alpha / rank * up @ down, with `up` zero at the start

The updates are parametrizations: the model computes with the sum, under the parameter's own name.

Shapes: O rows of a weight, I columns, r rank.
"""

import math
from typing import Any, SupportsIndex, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

ADAPTED = (  # attention in and out, the perceptrons, a ResNet's attention pool
    "attn.in_proj_weight",
    "attn.out_proj.weight",
    "mlp.c_fc.weight",
    "mlp.c_proj.weight",
    "attnpool.q_proj.weight",
    "attnpool.k_proj.weight",
    "attnpool.v_proj.weight",
    "attnpool.c_proj.weight",
)
_MARK = "parametrizations."  # torch's, in the names of what is behind a parametrized weight


class LowRank(nn.Module):
    """What is added to a weight of (O, I)."""

    def __init__(self, weight: torch.Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.scale = alpha / rank
        self.down = nn.Parameter(weight.new_empty(rank, columns))  # (r, I)
        self.up = nn.Parameter(weight.new_zeros(rows, rank))  # (O, r)
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as the paper's code

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """(O, I) -> (O, I)."""
        return weight + self.scale * (self.up @ self.down)


def add_low_rank(model: nn.Module, rank: int, alpha: float) -> None:
    """Give every adapted weight that is trained a low-rank update; all else is locked."""
    adapted = [
        name for name, p in model.named_parameters() if p.requires_grad and name.endswith(ADAPTED)
    ]
    model.requires_grad_(False)
    for name in adapted:
        path, _, weight = name.rpartition(".")
        update = LowRank(model.get_parameter(name).detach(), rank, alpha)
        _parametrize(model.get_submodule(path), {weight: update})


def _parametrize(module: nn.Module, updates: dict[str, nn.Module]) -> nn.Module:
    """Add updates to a module's weights, by the weights' names."""
    for weight, update in updates.items():
        parametrize.register_parametrization(module, weight, update)
    # PyTorch gives each such module a class of its own, which refuses to be pickled.
    type(module).__reduce_ex__ = _reduce
    return module


def _reduce(module: nn.Module, protocol: SupportsIndex) -> tuple[Any, ...]:
    """A parametrized module for pickle: the plain module and its updates."""
    lists = cast(nn.ModuleDict, module.parametrizations)
    state = module.__dict__.copy()
    parameters = {name: one.original for name, one in lists.items()}
    state["_parameters"] = state["_parameters"] | parameters
    state["_modules"] = {k: m for k, m in module.named_children() if k != "parametrizations"}
    updates = {name: cast(nn.ModuleList, one)[0] for name, one in lists.items()}
    return _restore, (type(module).__bases__[0], state, updates)


def _restore(kind: type[nn.Module], state: dict[str, Any], updates: dict[str, Any]) -> nn.Module:
    module = kind.__new__(kind)
    module.__setstate__(state)
    return _parametrize(module, updates)


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a model by its plain names: every updated weight is one tensor, the sum."""
    state = {}
    for name, tensor in model.state_dict().items():
        if _MARK not in name:
            state[name] = tensor
        elif name.endswith(".original"):
            plain = name.removesuffix(".original").replace(_MARK, "")
            path, _, weight = plain.rpartition(".")
            state[plain] = getattr(model.get_submodule(path), weight).detach()
    return state
