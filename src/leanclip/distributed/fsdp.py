"""Parameters sharded over the ranks, by PyTorch's FSDP2.

    model -> shard_model -> each rank's part of parameters, gradients and optimizer state

PyTorch's modules for this are imported on use: DTensor alone takes a second.
"""

from torch import nn

from leanclip.config.sections import to_plain
from leanclip.distributed.collectives import rank_and_world_size
from leanclip.model import CLIP
from leanclip.model.parameters import SCALARS, is_shard
from leanclip.model.skip_init import meta_device


def shard_model(model: CLIP, blocks: list[nn.Module]) -> None:
    """Replace every parameter by this rank's part; those of a block are gathered when it runs.

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
    """Whether `shard_model` was applied."""
    return any(is_shard(parameter) for parameter in model.parameters())


def full_model(model: CLIP) -> CLIP:
    """The model, or an unsharded copy of a sharded one on each rank; every rank calls this."""
    if not is_sharded(model):
        return model
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    tensors = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    with meta_device():
        copy = CLIP(**to_plain(model.config))
    copy.load_state_dict(tensors, assign=True)
    return copy
