"""Low-rank updates of a CLIP's matrices (LoRA, arXiv 2106.09685), merged when saved.

    weight -> weight + alpha / rank * up @ down, with `up` initialised to zero

The updates are torch parametrizations: the model sees the sum under the parameter's own name.

Shapes: O rows of a weight, I columns, r rank.
"""

import math
from typing import Any, SupportsIndex, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

ADAPTED = (  # attention, also of the attention pools, and MLPs
    "attn.in_proj_weight",
    "attn.q_proj_weight",
    "attn.k_proj_weight",
    "attn.v_proj_weight",
    "attn.out_proj.weight",
    "mlp.c_fc.weight",
    "mlp.c_proj.weight",
    "attnpool.q_proj.weight",
    "attnpool.k_proj.weight",
    "attnpool.v_proj.weight",
    "attnpool.c_proj.weight",
)
_PARAMETRIZATIONS = "parametrizations."  # in the names of parametrized weights


class LowRank(nn.Module):
    """A weight (O, I) with its update."""

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
    """Add an update to every trained weight in ADAPTED, and lock all other parameters."""
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
    # PyTorch gives each such module its own class, which cannot be pickled.
    type(module).__reduce_ex__ = _reduce
    return module


def _reduce(module: nn.Module, protocol: SupportsIndex) -> tuple[Any, ...]:
    """Pickle a parametrized module as the plain module and its updates."""
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
    """The state dict of a model with the updates merged into their weights."""
    state = {}
    for name, tensor in model.state_dict().items():
        if _PARAMETRIZATIONS not in name:
            state[name] = tensor
        elif name.endswith(".original"):
            plain = name.removesuffix(".original").replace(_PARAMETRIZATIONS, "")
            path, _, weight = plain.rpartition(".")
            state[plain] = getattr(model.get_submodule(path), weight).detach()
    return state
