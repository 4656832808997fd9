"""Activation checkpointing, compilation, and DDP or FSDP, around a model's towers.

    model -> checkpointed blocks -> compiled towers -> DDP or FSDP -> `train_step`

The names of parameters do not change. FSDP2 is imported on use: DTensor alone takes a second.
"""

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from leanclip.config.sections import to_plain
from leanclip.config.training import TrainConfig
from leanclip.distributed.collectives import rank_and_world_size
from leanclip.model import CLIP
from leanclip.model.parameters import SCALARS, is_shard
from leanclip.model.resnet import Bottleneck
from leanclip.model.skip_init import meta_device
from leanclip.model.transformer import Block

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def wrap_model(model: CLIP, settings: TrainConfig) -> nn.Module:
    """The module to call with pixels and tokens in training; changes the model in place."""
    if settings.checkpoint_activations:
        checkpoint_activations(model)
    if settings.compile:
        compile_towers(model)
    is_on_cpu = model.logit_scale.device.type == "cpu"
    # On a GPU packing synchronizes for the lengths; compiled, it causes many recompilations.
    model.uses_packing = is_on_cpu and not settings.compile
    if is_on_cpu:
        keep_freed_memory()
    return wrap_ddp(model, settings.sharding)


def checkpoint_activations(model: CLIP) -> None:
    """Store only each block's input for the backward pass, and recompute the rest there.

    The random numbers are the same again; BatchNorm statistics are updated once.
    """
    for block in _blocks(model):
        run = partial(checkpoint, block.forward, use_reentrant=False)
        if isinstance(block, Bottleneck):
            run = partial(
                run, context_fn=lambda block=block: (nullcontext(), eval_mode_batch_norm(block))
            )
        block.forward = run  # inside of FSDP's hooks


def compile_towers(model: CLIP, backend: str = "inductor") -> None:
    """Compile both towers in place, each on its first call.

    A second text length recompiles the text tower, with a dynamic length.
    """
    model.visual.compile(backend=backend)
    model.encode_text = torch.compile(model.encode_text, backend=backend)


def keep_freed_memory() -> None:
    """Make glibc reuse the memory of one step's tensors in the next step.

    By default it returns the memory to the system, and every page is mapped and cleared again.
    Tensors over 32 MiB, glibc's maximum, and other C libraries are not affected.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


@contextmanager
def eval_mode_batch_norm(module: nn.Module) -> Iterator[None]:
    """Within the block BatchNorm does not update its running statistics."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    previous = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, previous, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def wrap_ddp(model: CLIP, sharding: str = "ddp") -> nn.Module:
    """A module that averages gradients over the ranks; the model itself on a single rank.

    The scalars of the loss are excluded: their gradients come from the loss, not from a forward
    pass of the towers, and `train_step` averages them.

    Args:
        model: with "fsdp" its parameters are replaced by shards; create the optimizer afterwards.
        sharding: "ddp" or "fsdp".
    """
    if rank_and_world_size()[1] == 1:
        return model
    if sharding == "fsdp":
        shard_model(model)
        return model
    # DDP has two names for parameters of the top module, with and without a leading dot.
    names = [prefix + name for name in SCALARS for prefix in ("", ".")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def shard_model(model: CLIP) -> None:
    """Replace every parameter by this rank's part; those of a block are gathered when it runs.

    The scalars of the loss stay whole on every rank.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = model.logit_scale.device
    mesh = init_device_mesh(device.type, (rank_and_world_size()[1],))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    scalars = {p for name, p in model.named_parameters() if name in SCALARS}
    fully_shard(model, mesh=mesh, ignored_params=scalars)


def gradient_sync(towers: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
    """Average gradients over ranks only in the last micro-batch; for its forward and backward."""
    if isinstance(towers, DistributedDataParallel):
        return nullcontext() if is_last else towers.no_sync()
    if is_sharded(towers):
        from torch.distributed.fsdp import FSDPModule

        assert isinstance(towers, FSDPModule)
        towers.set_requires_gradient_sync(is_last)
    return nullcontext()


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
    copy.tokenizer = model.tokenizer
    copy.load_state_dict(tensors, assign=True)
    return copy


def _blocks(model: CLIP) -> list[nn.Module]:
    """The repeated blocks of both towers, which use most of the memory."""
    return [module for module in model.modules() if isinstance(module, Block | Bottleneck)]
