"""How the towers are run in training: less memory, compiled, and over the ranks.

    model -> checkpointed blocks -> compiled towers -> DDP's or FSDP's module -> `train_step`

Parameters keep their names all along.
"""

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from leanclip.config.training import TrainConfig
from leanclip.distributed.collectives import rank_and_world_size
from leanclip.distributed.fsdp import is_sharded, shard_model
from leanclip.model import CLIP
from leanclip.model.parameters import SCALARS
from leanclip.model.resnet import Bottleneck
from leanclip.model.transformer import Block

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def wrap_model(model: CLIP, settings: TrainConfig) -> nn.Module:
    """The module that is called with pixels and tokens; the model itself changes with it."""
    if settings.checkpoint_activations:
        checkpoint_activations(model)
    if settings.compile:
        compile_towers(model)
    is_on_cpu = model.logit_scale.device.type == "cpu"
    # A GPU would have to wait for the lengths of the texts, and compiled graphs want few shapes.
    model.packs_texts = is_on_cpu and not settings.compile
    if is_on_cpu:
        keep_freed_memory()
    return wrap_ddp(model, settings.sharding)


def checkpoint_activations(model: CLIP) -> None:
    """Keep each block's input alone for the backward pass, which computes the rest again.

    What is drawn at random is drawn the same again, and statistics of a BatchNorm are not
    updated twice.
    """
    for block in _blocks(model):
        run = partial(checkpoint, block.forward, use_reentrant=False)
        if isinstance(block, Bottleneck):
            run = partial(
                run, context_fn=lambda block=block: (nullcontext(), eval_mode_batch_norm(block))
            )
        block.forward = run  # hooks around the block, FSDP's, stay outside


def compile_towers(model: CLIP, backend: str = "inductor") -> None:
    """Compile both towers in place, each when it first runs.

    Another length of texts compiles the text tower a second time, for any length.
    """
    model.visual.compile(backend=backend)
    model.encode_text = torch.compile(model.encode_text, backend=backend)


def keep_freed_memory() -> None:
    """Have glibc keep the memory of a step's tensors for the next step.

    It would give it back to the system, and every page be cleared and mapped anew. Tensors over
    32 MiB, the most that glibc keeps, are not changed by this, nor is another C library.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


@contextmanager
def eval_mode_batch_norm(module: nn.Module) -> Iterator[None]:
    """Normalise by the batch as in training, without a change to the running statistics."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def wrap_ddp(model: CLIP, sharding: str = "ddp") -> nn.Module:
    """The towers with gradients averaged over the ranks; the model itself where there is one.

    The scalars of the loss take no part: their gradients come from the loss, not from a forward
    pass, and `train_step` averages them.

    Args:
        model: whole; with "fsdp" its parameters are replaced by shards, before an optimiser is
            made of them.
        sharding: "ddp" or "fsdp".
    """
    if rank_and_world_size()[1] == 1:
        return model
    if sharding == "fsdp":
        shard_model(model, _blocks(model))
        return model
    # By both names that DDP has for a parameter at the top: with its module before the dot, or not.
    names = [prefix + name for name in SCALARS for prefix in ("", ".")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def gradient_sync(towers: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
    """Around forward and backward of a micro-batch: ranks sum their gradients with the last."""
    if isinstance(towers, DistributedDataParallel):
        return nullcontext() if is_last else towers.no_sync()
    if is_sharded(towers):
        from torch.distributed.fsdp import FSDPModule

        assert isinstance(towers, FSDPModule)
        towers.set_requires_gradient_sync(is_last)
    return nullcontext()


def _blocks(model: CLIP) -> list[nn.Module]:
    """The parts that both towers repeat, in which most of the memory is."""
    return [module for module in model.modules() if isinstance(module, Block | Bottleneck)]
