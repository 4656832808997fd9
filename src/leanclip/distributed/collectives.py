"""The device and process group of a rank, and collective operations over all ranks.

Without a process group, each operation returns its input.

Shapes: n rows of this rank, N rows of all ranks.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from leanclip.distributed import is_rank
from leanclip.errors import ConfigError, LeanclipError

T = TypeVar("T")
_BROADCAST_BYTES = 1 << 28  # at once


def choose_device(name: str = "auto", num_gpus: int | None = None) -> torch.device:
    """The device of this process: on a GPU, that of its local rank.

    Args:
        name: "cpu", "cuda", or "auto": a GPU if there is one.
        num_gpus: of --num-gpus: 0 is the CPU, None follows `name`.

    Raises:
        ConfigError: the machine has fewer GPUs.
    """
    found = torch.cuda.device_count()
    wanted = num_gpus if num_gpus is not None else int(name == "cuda")
    if wanted > found:
        instead = f"give --num-gpus {found}" if found else "leave --num-gpus out to use the CPU"
        raise ConfigError(f"{wanted} GPU(s) requested, this machine has {found}; {instead}")
    if wanted or (name == "auto" and num_gpus is None and found):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def join_group(device: torch.device) -> None:
    """Join the process group of the other ranks, if a launcher started several.

    It is not destroyed at the end: `destroy_process_group` may deadlock with a thread of gloo,
    which needs the GIL to release its last tensor.
    """
    if not is_rank():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(hours=1)  # other ranks wait while the first one writes its report
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    # The elastic launcher keeps its store over restarts, with addresses of ranks that are gone.
    store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def is_lost_rank(error: Exception) -> bool:
    """Whether an error only says that another rank is gone."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error))


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def barrier() -> None:
    """Wait for every rank."""
    all_reduce_sum([0])


def all_reduce_sum(counts: Sequence[int]) -> list[int]:
    """The sums over ranks of a few numbers."""
    return sum_over_ranks(torch.tensor(counts)).tolist()


def all_gather_object(value: T) -> list[T]:
    """The small objects of all ranks, by rank."""
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return [value]
    values: list[T | None] = [None] * world_size
    dist.all_gather_object(values, value)
    return [value for value in values if value is not None]


def from_first(get: Callable[[], T]) -> T:
    """Call a function on the first rank and return its result, a small object, on all ranks.

    Raises:
        LeanclipError, OSError: on all ranks, if the function raises it.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return get()
    found: list[tuple[T | None, Exception | None]] = [(None, None)]
    if rank == 0:
        try:
            found = [(get(), None)]
        except (LeanclipError, OSError) as error:
            found = [(None, error)]
    dist.broadcast_object_list(found, 0)
    value, error = found[0]
    if error is not None:
        raise error
    return cast(T, value)


def tensors_from_first(
    get: Callable[[], Mapping[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """As `from_first`, for CPU tensors of any size."""
    if rank_and_world_size()[1] == 1:
        return dict(get())
    found: dict[str, torch.Tensor] = {}

    def describe() -> dict[str, tuple[torch.dtype, torch.Size]]:
        found.update({name: tensor.contiguous() for name, tensor in get().items()})
        return {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()}

    for name, (dtype, shape) in from_first(describe).items():
        if name not in found:
            found[name] = torch.empty(shape, dtype=dtype)
        if found[name].numel():
            for part in found[name].reshape(-1).view(torch.uint8).split(_BROADCAST_BYTES):
                dist.broadcast(part, 0)
    return found


def raise_if_any(*, problem: str) -> None:
    """Raise the problem of any rank on all ranks; every rank calls this, "" is no problem.

    Raises:
        OSError: there is one.
    """
    for found in all_gather_object(problem):
        if found:
            raise OSError(found)


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, as a new tensor."""
    if rank_and_world_size()[1] == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total


def mean_over_ranks_(values: Sequence[torch.Tensor]) -> None:
    """Replace each value by its mean over ranks."""
    world_size = rank_and_world_size()[1]
    for value in values if world_size > 1 else ():
        dist.all_reduce(value)
        value /= world_size


def broadcast_buffers(model: nn.Module) -> None:
    """Broadcast the buffers of the first rank: BatchNorm's statistics differ between ranks."""
    if rank_and_world_size()[1] > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def gather_rows(rows: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Gather (n, ...) of each rank to (N, ...) by rank, and each rank's n.

    Ranks may have different n, also 0. No gradient flows.
    """
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return rows, [len(rows)]
    sizes = [rows.new_zeros(1, dtype=torch.int64) for _ in range(world_size)]
    dist.all_gather(sizes, sizes[0].new_tensor([len(rows)]))
    counts = [int(size) for size in sizes]
    longest = max(counts)
    parts = [rows.new_empty(longest, *rows.shape[1:]) for _ in range(world_size)]
    dist.all_gather(parts, _padded(rows, longest))
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]), counts


def reduce_scatter_rows(rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Sum (N, ...) over ranks and return this rank's rows (n, ...)."""
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return rows
    longest = max(sizes)
    mine = rows.new_empty(longest, *rows.shape[1:])
    dist.reduce_scatter(mine, [_padded(part, longest) for part in rows.split(sizes)])
    return mine[: sizes[rank]]


def _padded(rows: torch.Tensor, length: int) -> torch.Tensor:
    """Rows followed by zeros: all ranks must have the same shape."""
    padding = [0, 0] * (rows.dim() - 1) + [0, length - len(rows)]
    return nn.functional.pad(rows, padding).contiguous()
