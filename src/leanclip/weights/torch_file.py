"""Read tensors out of PyTorch's files: torch.save's zips, TorchScript's, and the older pickles.

Both kinds of zip hold `<root>/data.pkl`, a pickle that describes the tensors, and their values
in `<root>/data/<key>`:

    file -> its members' places -> interpret(data.pkl) -> tensors, views of the mapped file

Nothing is unpacked, and nothing of torch.load or torch.jit is used (unpickle.py says why);
TorchScript's code is not looked at.
"""

import io
import math
import mmap
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch

from leanclip.errors import WeightsError
from leanclip.weights.unpickle import (
    Module,
    Name,
    check_path,
    interpret,
    numpy_names,
    weights_errors,
)

_MAX_MODULES = 200_000
_LEGACY_PROTOCOL = 1001
_STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")


def read_torch_zip(path: str | Path) -> object:
    """Read what a torch.save zip or a TorchScript zip holds.

    Tensors lie over a private map of the file: reading is lazy, writing to them changes
    memory and not the file, which must stay in place as long as they live. None requires a
    gradient; a Parameter becomes its tensor, an OrderedDict a dict, an object of TorchScript a
    Module; numbers, text and numpy arrays stay.

    Raises:
        WeightsError: the file is missing, damaged, or a zip of another kind; its pickle mentions
            anything but data; a tensor does not fit in its storage.
    """
    path = Path(path)
    with weights_errors(path, "zip of PyTorch's"), path.open("rb") as file:
        members = _members(file)
        roots = [name for name in members if name.split("/")[1:] == ["data.pkl"]]
        if len(roots) != 1:
            raise WeightsError(f"a zip with {len(roots)} stored <name>/data.pkl; PyTorch's has one")
        root = roots[0].removesuffix("data.pkl")
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        storages: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        left = len(mapped)  # bytes of storages: one that is not aligned is copied

        def content(name: str) -> memoryview:
            if root + name not in members:
                raise WeightsError(f"has no member {root + name!r:.100}")
            return mapped[members[root + name]]

        def storage(identity: object) -> torch.Tensor:
            nonlocal left
            key, dtype, count = _storage_id(identity)
            if (key, dtype) not in storages:
                left -= len(content(f"data/{key}"))
                if left < 0:
                    raise WeightsError("its storages overlap")
                storages[key, dtype] = _flat(content(f"data/{key}"), dtype)
            found = storages[key, dtype]
            if len(found) != count or found.nbytes != len(content(f"data/{key}")):
                raise WeightsError(
                    f"storage {key!r:.80} has {len(content(f'data/{key}'))} bytes, not {count} "
                    f"of {dtype}"
                )
            return found

        if root + "byteorder" in members and bytes(content("byteorder")).strip() != b"little":
            raise WeightsError("written on a big-endian machine, which is not read")
        pickle = content("data.pkl")
        return interpret(io.BytesIO(pickle), len(pickle), _torch_names(), storage)


def read_torch_legacy(path: str | Path) -> object:
    """Read a torch.save file from before PyTorch 1.6: four pickles, keys, and each key's values.

    The result is as of `read_torch_zip`, but the values are in memory.

    Raises:
        WeightsError: the file is missing or damaged, or holds more than tensors and plain values.
    """
    path = Path(path)
    with weights_errors(path, "file of PyTorch's"), path.open("rb") as file:
        left = size = path.stat().st_size
        storages: dict[str, torch.Tensor] = {}

        def storage(identity: object) -> torch.Tensor:
            nonlocal left
            key, dtype, count = _storage_id(identity)
            if key not in storages:
                left -= count * dtype.itemsize
                if left < 0:
                    raise EOFError(f"truncated: storage {key!r:.80} is larger than what is left")
                storages[key] = torch.empty(count, dtype=dtype)
            if storages[key].dtype != dtype or len(storages[key]) != count:
                raise WeightsError(f"storage {key!r:.80} has two types or sizes")
            return storages[key]

        def pickle() -> object:
            return interpret(file, size - file.tell(), _torch_names(), storage)

        _, protocol, system = pickle(), pickle(), pickle()
        is_little = isinstance(system, dict) and system.get("little_endian") is True
        if protocol != _LEGACY_PROTOCOL or not is_little:
            raise WeightsError("of an unknown protocol, or written on a big-endian machine")
        loaded, keys = pickle(), pickle()
        # Comparing lists that share lists takes exponential time: only texts are compared.
        if type(keys) is not list or any(type(key) is not str for key in keys):
            raise WeightsError("its list of storages is not of texts")
        if sorted(keys) != sorted(storages):
            raise WeightsError("its list of storages is not that of its tensors")
        for key in keys:
            _fill(storages[key], key, file)
        return loaded


def module_tensors(root: object) -> dict[str, torch.Tensor]:
    """The tensors of a TorchScript Module by dotted names, as `state_dict()` has them.

    Raises:
        WeightsError: `root` is not a Module, or shares modules so often that the names explode.
    """
    if not isinstance(root, Module):
        raise WeightsError(f"not an object of TorchScript but a {type(root).__name__}")
    tensors: dict[str, torch.Tensor] = {}
    waiting = [("", root)]
    for _ in range(_MAX_MODULES):
        if not waiting:
            return tensors
        prefix, module = waiting.pop()
        for name, value in module.attributes.items():
            if isinstance(value, torch.Tensor):
                tensors[check_path(f"{prefix}{name}")] = value
            elif isinstance(value, Module):
                waiting.append((check_path(f"{prefix}{name}."), value))
    raise WeightsError(f"an object of TorchScript has more than {_MAX_MODULES:,} modules")


def _members(file: BinaryIO) -> dict[str, slice]:
    """Where the bytes of each member lie in a zip; those of compressed members are left out."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    members = {}
    for entry in entries:
        # Code in TorchScript's zips is compressed; tensors and data.pkl never are.
        if entry.compress_type == zipfile.ZIP_STORED:
            file.seek(entry.header_offset + 26)  # the sizes of what ends the local header
            start = entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            members[entry.filename] = slice(start, start + entry.file_size)
    return members


def _storage_id(identity: object) -> tuple[str, torch.dtype, int]:
    """Key, type and count of ("storage", type, key, device, count[, view of another])."""
    match identity:
        case ("storage", Name(name=name), str(key), str(), int(count), *view) if (
            name in _STORAGES and count >= 0 and view in ([], [None])
        ):
            return key, _STORAGES[name], count
    raise WeightsError("refers to data outside the pickle in an unknown form, or to a view")


def _flat(data: memoryview, dtype: torch.dtype) -> torch.Tensor:
    """A one-dimensional tensor over bytes."""
    if len(data) < dtype.itemsize:
        return torch.empty(0, dtype=dtype)
    flat = torch.frombuffer(data, dtype=dtype, count=len(data) // dtype.itemsize)
    # torch.save aligns to 64 bytes; zips that were written anew may not.
    return flat if flat.data_ptr() % dtype.itemsize == 0 else flat.clone()


def _fill(storage: torch.Tensor, key: str, file: BinaryIO) -> None:
    """Read a legacy file's storage: a count of eight bytes, then as many values."""
    count = int.from_bytes(file.read(8), "little")
    values = storage.view(torch.uint8).numpy()
    if count != len(storage) or file.readinto(values) < len(values):  # type: ignore[attr-defined]
        raise EOFError(f"truncated: storage {key!r:.80} has fewer than {len(values)} bytes")


def _rebuild_tensor(
    storage: object, offset: object, size: object, stride: object, *unused: object
) -> torch.Tensor:
    """A tensor over a storage; `unused`: does it require a gradient, its hooks, its metadata."""
    if not isinstance(storage, torch.Tensor):
        raise WeightsError(f"a tensor's storage is a {type(storage).__name__}")
    if len(unused) > 2 and unused[2]:
        raise WeightsError("a tensor has metadata, such as a conjugate's, that is not read")
    if type(offset) is not int or type(size) is not tuple or type(stride) is not tuple:
        raise WeightsError("a tensor's offset, size or stride has an unknown form")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
        raise WeightsError("a tensor's offset, size and stride are not matching counts")
    count, present = math.prod(size), storage.numel()
    if count == 0:
        return torch.empty(size, dtype=storage.dtype)
    end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    # A stride of 0 may make any size out of one value: it fits, but nothing that uses it does.
    if end > present or count > present:
        raise WeightsError(f"a tensor of size {size} ends outside its storage of {present} values")
    return storage.as_strided(size, stride, offset)


class _TorchNames(dict[str, object]):
    """The names in PyTorch's data.pkl; each TorchScript file makes up those of its classes."""

    def __missing__(self, name: str) -> object:
        if not name.startswith("__torch__."):
            raise KeyError(name)
        return Name(name, Module)


def _torch_names() -> _TorchNames:
    calls = {
        "torch._utils._rebuild_tensor": _rebuild_tensor,
        "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
        "torch._utils._rebuild_parameter": lambda tensor, requires_grad, hooks: tensor,
        "torch.Size": lambda sizes: sizes,
        "torch.device": lambda *name: name,
        "torch.jit._pickle.restore_type_tag": lambda value, kind: value,
        **{f"torch.jit._pickle.{name}": lambda items: items for name in _LISTS},
    }
    names = _TorchNames(numpy_names())
    names |= {name: Name(name, call) for name, call in calls.items()}
    names |= {name: Name(name) for name in _STORAGES}
    names |= {str(dtype): dtype for dtype in _STORAGES.values()}
    return names
