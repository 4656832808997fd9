"""Which devices a run uses, and what its processes tell each other.

One process and many are one code path: with one, everything here gives back what it got.

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

from leanclip.errors import ConfigError, LeanclipError

T = TypeVar("T")
BROADCAST_BYTES = 1 << 28  # at most at once


def choose_device(name: str = "auto", num_gpus: int | None = None) -> torch.device:
    """The device of this process: "auto" is CUDA where there is a device, and the CPU elsewhere.

    A rank takes the GPU of its number on this machine.

    Args:
        name: "auto", "cpu" or "cuda".
        num_gpus: as `--num-gpus`; 0 is the CPU, None is one device.

    Raises:
        ConfigError: more devices are asked for than the machine has.
    """
    found = torch.cuda.device_count()
    wanted = num_gpus if num_gpus is not None else int(name == "cuda")
    if wanted > found:
        has = f"has {found} CUDA device{'' if found == 1 else 's'}"
        instead = f"give --num-gpus {found}" if found else "leave --num-gpus out to use the CPU"
        asked = f"{wanted} GPU{' was' if wanted == 1 else 's were'} asked for"
        raise ConfigError(f"{asked}, this machine {has}; {instead}")
    if not (wanted or (name == "auto" and num_gpus is None and found > 0)):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def join_group(device: torch.device) -> None:
    """Join the other ranks, where a launcher started several; the end of the process leaves them.

    PyTorch's `destroy_process_group` may wait for ever, holding Python's lock, for a thread of
    gloo that waits for that lock to let go of its last tensor.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(hours=1)  # others wait for rank 0's tests
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    # The elastic launcher keeps its store over a restart; the addresses of then lead nowhere.
    store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def is_lost_rank(error: Exception) -> bool:
    """Whether an error says no more than that another rank is gone."""
    if not dist.is_initialized():
        return False
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def rank_and_world_size() -> tuple[int, int]:
    """This process's number and how many there are: (0, 1) without a process group."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        all_reduce_sum([0])


def all_reduce_sum(counts: Sequence[int]) -> list[int]:
    """The sums over the ranks of a few numbers that are on the CPU."""
    return sum_over_ranks(torch.tensor(counts)).tolist()


def all_gather_object(value: T) -> list[T]:
    """A small object of every rank, in the order of ranks."""
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return [value]
    values: list[T | None] = [None] * world_size
    dist.all_gather_object(values, value)
    return [value for value in values if value is not None]


def from_first(get: Callable[[], T]) -> T:
    """What the first rank gets, a small object, on every rank.

    Raises:
        LeanclipError, OSError: on every rank, where the first one gets none.
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
    """As `from_first`, of tensors on the CPU, which may be large."""
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
            for part in found[name].reshape(-1).view(torch.uint8).split(BROADCAST_BYTES):
                dist.broadcast(part, 0)
    return found


def raise_if_any(*, problem: str) -> None:
    """Every rank says what went wrong, or nothing; all go on, or none.

    Raises:
        OSError: one of them had a problem.
    """
    for found in all_gather_object(problem):
        if found:
            raise OSError(found)


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The sum of every rank's value, on every rank."""
    if rank_and_world_size()[1] == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total


def mean_over_ranks_(values: Sequence[torch.Tensor]) -> None:
    """Put the mean of every rank's values in their place."""
    world_size = rank_and_world_size()[1]
    for value in values if world_size > 1 else ():
        dist.all_reduce(value)
        value /= world_size


def share_buffers(model: nn.Module) -> None:
    """Give every rank the first one's buffers: a BatchNorm's statistics are each rank's own."""
    if rank_and_world_size()[1] > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def gather_rows(rows: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """(n, ...) of each rank -> (N, ...) in the order of ranks, and each rank's n.

    Ranks may have different n, or none; no gradient flows.
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


def sum_rows_back(rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """(N, ...) of each rank -> (n, ...): this rank's rows of the sum over all ranks."""
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return rows
    longest = max(sizes)
    mine = rows.new_empty(longest, *rows.shape[1:])
    dist.reduce_scatter(mine, [_padded(part, longest) for part in rows.split(sizes)])
    return mine[: sizes[rank]]


def _padded(rows: torch.Tensor, length: int) -> torch.Tensor:
    """Rows with zeros after them; collectives want the same shape of all."""
    if len(rows) == length:
        return rows.contiguous()
    padded = rows.new_zeros(length, *rows.shape[1:])
    padded[: len(rows)] = rows
    return padded
