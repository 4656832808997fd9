"""Parameters of the loss and of the towers, whole or sharded over the ranks."""

from typing import TYPE_CHECKING, TypeGuard

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

SCALARS = ("logit_scale", "logit_bias")  # of the loss, not of the towers


def is_shard(tensor: torch.Tensor) -> "TypeGuard[DTensor]":
    """Whether this is a DTensor, without its slow import."""
    return hasattr(tensor, "to_local")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a DTensor; other tensors unchanged."""
    return tensor.to_local() if is_shard(tensor) else tensor
