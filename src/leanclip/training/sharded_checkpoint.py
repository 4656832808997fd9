"""Sharded checkpoints: each rank writes its own part, and any number of ranks reads them.

    weights and moments, a shard on each rank <-> torch.distributed.checkpoint <-> safetensors

Tensors have the same names as in a normal checkpoint, and `load_shards` reads that too: each of its
tensors is a single shard.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from leanclip.errors import one_line
from leanclip.model import CLIP


def save_shards(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write this rank's part of the tensors into a new folder; every rank calls this.

    Raises:
        OSError: on every rank, if one of them could not write.
    """
    with _os_errors(folder, "written"):
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        # Buffers, which may differ between ranks, are those of the first rank.
        planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        save(dict(tensors), storage_writer=writer, planner=planner)


def load_shards(folder: Path, model: CLIP, optimizer: torch.optim.Optimizer) -> None:
    """Read this rank's part of weights and moments; every rank calls this.

    Raises:
        OSError: a file cannot be read.
    """
    tensors: dict[str, torch.Tensor] = dict(model.state_dict())
    with _os_errors(folder, "read"):
        for name, facts in _contents(folder).items():
            if name.startswith("optimizer."):
                parameter_name, _, key = name.removeprefix("optimizer.").rpartition(".")
                parameter = model.get_parameter(parameter_name)
                tensors[name] = (
                    torch.zeros(facts.size, device=parameter.device)
                    if key == "step"
                    else torch.zeros_like(parameter, requires_grad=False)
                )
                optimizer.state[parameter][key] = tensors[name]
        _load(folder, tensors)


def read_shards(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors, unsharded, in one process.

    Raises:
        OSError: a file is missing or cannot be read.
    """
    with _os_errors(folder, "read"):
        tensors = {
            name: torch.empty(facts.size, dtype=facts.properties.dtype)
            for name, facts in _contents(folder).items()
        }
        _load(folder, tensors)
    return tensors


def _load(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill the tensors in place."""
    with warnings.catch_warnings():  # of a single process
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))


def _contents(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Type, size and shards of every tensor, by name."""
    found: dict[str, TensorStorageMetadata] = {}
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    for name, facts in metadata.state_dict_metadata.items():
        assert isinstance(facts, TensorStorageMetadata)
        if sum(shard.sizes.numel() for shard in facts.chunks) != facts.size.numel():
            raise OSError(f"shards of {name} are missing")
        found[name] = facts
    return found


@contextmanager
def _os_errors(folder: Path, what: str) -> Iterator[None]:
    """Raise any error of PyTorch and safetensors as an OSError."""
    try:
        yield
    except CheckpointException as error:  # derives from BaseException
        reason = next(iter(error.failures.values()))[0]
        raise OSError(f"{folder}: cannot be {what}: {one_line(reason)}") from None
    except Exception as error:
        raise OSError(f"{folder}: cannot be {what}: {one_line(error)}") from None
