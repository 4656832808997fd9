"""Parameters in shards, one of each per rank: FSDP2.

    model -> shard_model -> each rank's part of parameters, gradients and moments -> whole

Imports wait until there are shards: those of DTensor alone take a second.
"""

import torch
from torch import nn

from leanclip.config.sections import to_plain
from leanclip.distributed.collectives import rank_and_world_size
from leanclip.model import CLIP
from leanclip.model.parameters import SCALARS, is_shard
from leanclip.model.skip_init import meta_device


def shard_model(model: CLIP, blocks: list[nn.Module]) -> None:
    """Leave each rank its part of every parameter; a block's are brought together when it runs.

    The scalars of the loss stay whole on every rank.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = model.logit_scale.device
    mesh = init_device_mesh(device.type, (rank_and_world_size()[1],))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    scalars = {p for name, p in model.named_parameters() if name in SCALARS}
    fully_shard(model, mesh=mesh, ignored_params=scalars)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_model` has been here."""
    return any(is_shard(parameter) for parameter in model.parameters())


def full_model(model: CLIP) -> CLIP:
    """The model; of a sharded one a copy with every parameter, on each rank.

    Every rank calls this.
    """
    if not is_sharded(model):
        return model
    tensors = {
        name: tensor.full_tensor() if is_shard(tensor) else tensor.clone()
        for name, tensor in model.state_dict().items()
    }
    with meta_device():
        copy = CLIP(**to_plain(model.config))
    copy.load_state_dict(tensors, assign=True)
    return copy


def placed_as(tensor: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """A whole tensor, which every rank has, on the device and in the shards of another."""
    tensor = tensor.to(own.device)
    if not is_shard(own) or tensor.shape != own.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, own.device_mesh, own.placements, src_data_rank=None)
