"""Shards on disk: the part of a checkpoint that the ranks write together.

    each rank's part of weights and moments <-> torch.distributed.checkpoint <-> any number of ranks

A folder of shards holds `__RANK_0.distcp`, which are read as plain tensors, and `.metadata`, which
is a pickle. It is read only from a checkpoint whose manifest was verified, and by a reader that
builds nothing but the few classes that belong there.
"""

import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from leanclip.errors import one_line
from leanclip.model import CLIP


def save_shards(folder: Path, model: CLIP, optimizer: torch.optim.Optimizer) -> None:
    """Write weights and moments, each rank its own part, into a folder of its own.

    Raises:
        OSError: on every rank, where one could not write.
    """
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"optimizer.{name}.{key}"] = value
    try:
        # Buffers, which may differ by rank, are the first one's.
        planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        save(state, storage_writer=FileSystemWriter(folder), planner=planner)
    except CheckpointException as error:  # derives from BaseException
        raise OSError(f"{folder}: {_first_reason(error)}") from None


def load_shards(folder: Path, model: CLIP, optimizer: torch.optim.Optimizer) -> None:
    """Bring weights and moments back, over any number of ranks; the manifest is verified before.

    Raises:
        OSError: a file cannot be read.
    """
    reader = _Reader(folder)
    state: dict[str, Any] = {f"model.{name}": t for name, t in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        moments = {
            key.removeprefix(prefix): torch.zeros(size, device=parameter.device)
            if key == f"{prefix}step"
            else torch.zeros_like(parameter, requires_grad=False)
            for key, size, _ in reader.tensors()
            if key.startswith(prefix)
        }
        if moments:
            optimizer.state[parameter] = moments
        state |= {f"{prefix}{key}": value for key, value in moments.items()}
    _load(reader, state)


def read_shards(folder: Path) -> dict[str, torch.Tensor]:
    """All of it in one process: `model.NAME` and `optimizer.NAME.KEY`, whole.

    Raises:
        OSError: a file cannot be read.
    """
    reader = _Reader(folder)
    state = {key: torch.empty(size, dtype=dtype) for key, size, dtype in reader.tensors()}
    _load(reader, state)
    return state


def _load(reader: "_Reader", state: dict[str, Any]) -> None:
    try:
        with warnings.catch_warnings():  # of one process it says that it takes it to be one
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(state, storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise OSError(f"{reader.folder}: cannot be read: {_first_reason(error)}") from None


def _first_reason(error: CheckpointException) -> str:
    return one_line(next(iter(error.failures.values()))[0])


class _Reader(FileSystemReader):
    """Reads `.metadata` without running anything that it may say."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder
        with (folder / ".metadata").open("rb") as file:
            try:
                self.metadata: Metadata = _PlainUnpickler(file).load()
                if not isinstance(self.metadata, Metadata):
                    raise pickle.UnpicklingError("it holds something else")
            except Exception as error:  # pickle raises many kinds on damaged files
                where = folder / ".metadata"
                raise OSError(f"{where}: cannot be read: {one_line(error)}") from None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self.metadata

    def tensors(self) -> Iterator[tuple[str, torch.Size, torch.dtype]]:
        """Name, shape and type of every tensor."""
        most = sum(path.stat().st_size for path in self.folder.iterdir())
        for name, facts in self.metadata.state_dict_metadata.items():
            try:
                assert isinstance(facts, TensorStorageMetadata)
                dtype, size = facts.properties.dtype, torch.Size(facts.size)
                most -= size.numel() * dtype.itemsize
            except (AssertionError, AttributeError, TypeError, ValueError, RuntimeError):
                raise OSError(f"{self.folder / '.metadata'}: cannot be read: {name}") from None
            if most < 0:
                raise OSError(f"{self.folder}: cannot be read: the files are too small for {name}")
            yield name, size, dtype


class _PlainUnpickler(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    """Knows the classes that torch.distributed.checkpoint writes for tensors, and no other.

    It is Python's own one in Python: the one in C takes gigabytes for nine bytes of a damaged file.
    """

    _CLASSES = frozenset(
        {
            ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
            ("torch.distributed.checkpoint.metadata", "Metadata"),
            ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
            ("torch.distributed.checkpoint.metadata", "StorageMeta"),
            ("torch.distributed.checkpoint.metadata", "TensorProperties"),
            ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
            ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            ("torch", "Size"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),  # Python 3.13's
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._CLASSES:
            return super().find_class(module, name)
        dtype = getattr(torch, name, None) if module == "torch" else None
        return dtype if isinstance(dtype, torch.dtype) else self._refuse(module, name)

    def _refuse(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}")
