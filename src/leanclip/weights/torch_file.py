"""Read tensors out of PyTorch's files: torch.save's zips, TorchScript's, and the older pickles.

Both kinds of zip hold `<root>/data.pkl`, a pickle that describes the tensors, and their values
in `<root>/data/<key>`:

    file -> members, checked -> interpret(data.pkl) -> tensors, views of the mapped file

Nothing of torch.load or torch.jit is used: even its safe loader calls functions that a few hundred
bytes make fill the memory. TorchScript's code is not looked at.
"""

import io
import math
import mmap
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from leanclip.errors import WeightsError
from leanclip.weights.files import sniff
from leanclip.weights.numpy_pickle import numpy_names
from leanclip.weights.unpickle import Name, Unfinished, interpret, refusing

_MAX_MEMBERS = 200_000
_MAX_NAMES = 200_000
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
    gradient; a Parameter becomes its tensor. Devices become text, an OrderedDict a dict, an
    object of TorchScript a Module; numbers, text and numpy arrays stay.

    Raises:
        WeightsError: the file is missing, damaged, or a zip of another kind; its pickle asks
            to call anything, which is not done; a tensor does not fit in its storage.
    """
    path = Path(path)
    with refusing(path, "zip of PyTorch's"), path.open("rb") as file:
        members, root = _members(file)
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        order = members.get(f"{root}/byteorder")
        if order is not None and bytes(data[order.start : order.stop]).strip() != b"little":
            raise WeightsError("written on a big-endian machine, which is not read")
        pickle = members[f"{root}/data.pkl"]
        storages = _Storages(data, members, f"{root}/data/")
        return interpret(
            io.BytesIO(data[pickle.start : pickle.stop]),
            pickle.stop - pickle.start,
            _torch_names(),
            storages.find,
        )


def read_torch_legacy(path: str | Path) -> object:
    """Read a torch.save file from before PyTorch 1.6: four pickles, keys, and each key's values.

    What comes back is as of `read_torch_zip`, but the values are in memory.

    Raises:
        WeightsError: the file is missing or damaged, or holds more than tensors and plain values.
    """
    path = Path(path)
    if (kind := sniff(path)) != "torch-legacy":
        raise WeightsError(f"{path}: not an old file of torch.save's but a {kind}")
    with refusing(path, "file of PyTorch's"), path.open("rb") as file:
        size = path.stat().st_size

        def plain() -> object:
            return interpret(file, size - file.tell(), {})

        _, protocol, facts = plain(), plain(), plain()
        if protocol != 1001 or type(facts) is not dict or facts.get("little_endian") is not True:
            raise WeightsError("of an unknown protocol, or written on a big-endian machine")
        storages = _OldStorages(size)
        loaded = interpret(file, size - file.tell(), _torch_names(), storages.find)
        storages.fill(file, plain())
        return loaded


class Module(Unfinished):
    """An object of a TorchScript file: what it holds by name, without its code."""

    def __init__(self) -> None:
        self.attributes: dict[str, object] = {}

    def build(self, state: object) -> None:
        """Take the attributes."""
        if type(state) is not dict or not all(type(name) is str for name in state):
            raise WeightsError("an object of TorchScript has a state that is not a dict of names")
        self.attributes = state

    def finish(self, inner: Callable[[object], object]) -> object:
        """Itself, with finished attributes."""
        self.attributes = {name: inner(value) for name, value in self.attributes.items()}
        return self


def module_tensors(root: object) -> dict[str, torch.Tensor]:
    """The tensors of a TorchScript Module by dotted names, as `state_dict()` has them.

    Raises:
        WeightsError: `root` is not a Module, or shares modules so often that the names explode.
    """
    if not isinstance(root, Module):
        raise WeightsError(f"not an object of TorchScript but a {type(root).__name__}")
    tensors: dict[str, torch.Tensor] = {}
    waiting = [("", root)]
    for _ in range(_MAX_NAMES):
        if not waiting:
            return tensors
        prefix, module = waiting.pop()
        for name, value in module.attributes.items():
            if isinstance(value, torch.Tensor):
                tensors[prefix + name] = value
            elif isinstance(value, Module):
                waiting.append((f"{prefix}{name}.", value))
    raise WeightsError(f"an object of TorchScript has more than {_MAX_NAMES:,} modules")


@dataclass(frozen=True, slots=True)
class _Storage:
    data: memoryview
    dtype: torch.dtype


class _Storages:
    """Persistent ids: ("storage", type, key, device, numel) -> a member's bytes."""

    def __init__(self, data: memoryview, members: dict[str, range], prefix: str) -> None:
        self._data = data
        self._members = members
        self._prefix = prefix
        self._known: dict[tuple[str, torch.dtype], _Storage] = {}

    def find(self, identity: object) -> _Storage:
        if type(identity) is not tuple or len(identity) != 5:
            raise WeightsError("refers to data outside the pickle in an unknown form")
        kind, storage_type, key, device, count = identity
        name = storage_type.name if isinstance(storage_type, Name) else "something else"
        if type(kind) is not str or kind != "storage" or name not in _STORAGES:
            raise WeightsError(f"a storage's type is {name}")
        if type(key) is not str or type(device) is not str or type(count) is not int:
            raise WeightsError("a storage's key, device or size has an unknown form")
        dtype = _STORAGES[name]
        if (key, dtype) not in self._known:
            member = self._members.get(self._prefix + key)
            if member is None:
                raise WeightsError(f"has no member {self._prefix + key!r:.100}")
            data = self._data[member.start : member.stop]
            if dtype == torch.bool and np.frombuffer(data, np.uint8).max(initial=0) > 1:
                raise WeightsError("a boolean storage holds other bytes than 0 and 1")
            if member.start % dtype.itemsize:  # torch aligns to 64; rewritten zips may not
                data = memoryview(bytearray(data))
            self._known[key, dtype] = _Storage(data, dtype)
        storage = self._known[key, dtype]
        if count * dtype.itemsize != len(storage.data):
            raise WeightsError(
                f"storage {key!r:.80} has {len(storage.data)} bytes, not {count} of {dtype}"
            )
        return storage


class _OldStorages:
    """Persistent ids of old files: ("storage", type, key, device, numel, view), filled later."""

    def __init__(self, size: int) -> None:
        self._left = size  # bytes that the file may still promise
        self._known: dict[str, _Storage] = {}

    def find(self, identity: object) -> _Storage:
        if type(identity) is not tuple or len(identity) != 6:
            raise WeightsError("refers to data outside the pickle in an unknown form")
        kind, storage_type, key, _, count, view = identity
        name = storage_type.name if isinstance(storage_type, Name) else "something else"
        if type(kind) is not str or kind != "storage" or name not in _STORAGES:
            raise WeightsError(f"a storage's type is {name}")
        if type(key) is not str or type(count) is not int or count < 0 or view is not None:
            raise WeightsError("a storage's key or size has an unknown form, or it is a view")
        dtype = _STORAGES[name]
        size = count * dtype.itemsize
        if key not in self._known:
            self._left -= size
            if self._left < 0:
                raise EOFError(
                    f"truncated: storage {key!r:.80} has {size} bytes, more than is left"
                )
            self._known[key] = _Storage(memoryview(bytearray(size)), dtype)
        storage = self._known[key]
        if storage.dtype != dtype or len(storage.data) != size:
            raise WeightsError(f"storage {key!r:.80} has two types or sizes")
        return storage

    def fill(self, file: io.BufferedReader, keys: object) -> None:
        """Read the values of each key: a count of eight bytes, then as many values."""
        if type(keys) is not list or not all(type(key) is str for key in keys):
            raise WeightsError("its list of storages has an unknown form")
        if len(set(keys)) < len(keys) or set(keys) != self._known.keys():
            raise WeightsError("its list of storages is not that of its tensors")
        for key in keys:
            data, dtype = self._known[key].data, self._known[key].dtype
            count = int.from_bytes(file.read(8), "little")
            if count * dtype.itemsize != len(data) or file.readinto(data) < len(data):
                raise EOFError(f"truncated: storage {key!r:.80} has fewer than {len(data)} bytes")
            if dtype == torch.bool and np.frombuffer(data, np.uint8).max(initial=0) > 1:
                raise WeightsError("a boolean storage holds other bytes than 0 and 1")


def _rebuild_tensor(
    storage: object,
    offset: object,
    size: object,
    stride: object,
    requires_grad: object,
    hooks: object,
    metadata: object = None,
) -> torch.Tensor:
    if not isinstance(storage, _Storage):
        raise WeightsError(f"a tensor's storage is a {type(storage).__name__}")
    if type(metadata) not in (type(None), dict) or metadata:
        raise WeightsError("a tensor has metadata, such as a conjugate's, that is not read")
    if type(offset) is not int or type(size) is not tuple or type(stride) is not tuple:
        raise WeightsError("a tensor's offset, size or stride has an unknown form")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
        raise WeightsError("a tensor's offset, size and stride are not matching counts")
    count = math.prod(size)
    if count == 0:
        return torch.empty(size, dtype=storage.dtype)
    held = len(storage.data) // storage.dtype.itemsize
    end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    # A stride of 0 may make any size out of one value: it fits, but nothing that uses it does.
    if end > held or count > held:
        raise WeightsError(f"a tensor of size {size} ends outside its storage of {held} values")
    flat = torch.frombuffer(storage.data, dtype=storage.dtype)
    return flat.as_strided(size, stride, offset)


def _rebuild_parameter(tensor: object, requires_grad: object, hooks: object) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor):
        raise WeightsError(f"a parameter's values are a {type(tensor).__name__}")
    return tensor


class _TorchNames(dict[str, object]):
    """The names in honest data.pkls; classes of TorchScript are made up by each file."""

    def __missing__(self, name: str) -> object:
        if not name.startswith("__torch__."):
            raise KeyError(name)
        return Name(name, Module)


def _torch_names() -> _TorchNames:
    calls = {
        "torch._utils._rebuild_tensor": lambda storage, offset, size, stride: _rebuild_tensor(
            storage, offset, size, stride, False, None
        ),
        "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
        "torch._utils._rebuild_parameter": _rebuild_parameter,
        "torch.Size": lambda sizes: sizes,
        "torch.device": lambda *name: ":".join(map(_text, name)),
        "torch.jit._pickle.restore_type_tag": lambda value, kind: value,
        **{f"torch.jit._pickle.{name}": lambda items: items for name in _LISTS},
    }
    names = _TorchNames(numpy_names())
    names |= {name: Name(name, call) for name, call in calls.items()}
    names |= {name: Name(name) for name in _STORAGES}
    names |= {str(dtype): dtype for dtype in _STORAGES.values()}
    return names


def _text(part: object) -> str:
    if type(part) not in (str, int):
        raise WeightsError("a device has an unknown form")
    return str(part)


def _members(file: io.BufferedReader) -> tuple[dict[str, range], str]:
    """Where the bytes of each stored member lie, and the name of the root folder."""
    size = file.seek(0, io.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            entries, directory = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise WeightsError(f"not a whole zip: {error}; was it downloaded completely?") from None
    if len(entries) > _MAX_MEMBERS:
        raise WeightsError(f"holds {len(entries):,} members, more than {_MAX_MEMBERS:,}")
    if len({entry.filename for entry in entries}) < len(entries):
        raise WeightsError("holds two members of one name")
    members: dict[str, range] = {}
    end = directory
    for entry in sorted(entries, key=lambda entry: entry.header_offset, reverse=True):
        _check_name(entry)
        shown = f"member {entry.filename!r:.100}"
        if entry.flag_bits & 1:
            raise WeightsError(f"{shown} is encrypted")
        if entry.file_size > 1 << 20 and entry.file_size > 200 * entry.compress_size:
            raise WeightsError(f"{shown} unpacks to more than 200 times its size")
        start = _data_start(file, entry)
        if start + entry.compress_size > end or end > size:
            raise WeightsError(f"{shown} reaches past its place in the file")
        end = entry.header_offset
        # Code in TorchScript's zips is compressed; tensors and data.pkl never are.
        if entry.compress_type == zipfile.ZIP_STORED:
            if entry.file_size != entry.compress_size:
                raise WeightsError(f"{shown} is stored but has two sizes")
            members[entry.filename] = range(start, start + entry.file_size)
    roots = [name.split("/")[0] for name in members if name.split("/")[1:] == ["data.pkl"]]
    if len(roots) != 1:
        raise WeightsError(f"a zip with {len(roots)} stored <name>/data.pkl; PyTorch's have one")
    return members, roots[0]


def _check_name(entry: zipfile.ZipInfo) -> None:
    name = entry.orig_filename
    parts = name.removesuffix("/").split("/")
    if name != entry.filename or "\\" in name or ":" in parts[0]:
        raise WeightsError(f"holds a member with the odd name {name!r:.100}")
    if any(part in ("", ".", "..") for part in parts):
        raise WeightsError(f"holds a member outside of its folder: {name!r:.100}")


def _data_start(file: io.BufferedReader, entry: zipfile.ZipInfo) -> int:
    """Where the member's bytes begin: after the local header, whose size only it tells."""
    file.seek(entry.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise WeightsError(f"member {entry.filename!r:.100} has no header at its place")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return entry.header_offset + 30 + name_length + extra_length
