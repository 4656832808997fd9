"""Pickles and zips that would leave a mark on disk if anything in them ran."""

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np


def text(value: str) -> bytes:
    """BINUNICODE."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def raw(value: bytes) -> bytes:
    """BINBYTES."""
    return b"B" + struct.pack("<I", len(value)) + value


def name(module: str, attribute: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{attribute}\n".encode()


def arguments(*parts: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(parts) + b"t"


class Calls:
    """Pickles as a call."""

    def __init__(self, function: object, *values: object) -> None:
        self.call = function, values

    def __reduce__(self) -> tuple:
        return self.call


def programs(mark: Path) -> dict[str, bytes]:
    """Pickles by what they try; each makes `mark` under plain pickle.load.

    EXT1 needs the extension code 240 to be `os.system`.
    """
    shell = f"touch {mark}"
    python = f"open({str(mark)!r}, 'w').close()"
    write = text(str(mark)), text("w")
    memmap = text(str(mark)), text("uint8"), text("w+"), b"K\0", b"(K\1t"
    nested = pickle.dumps(Calls(os.system, shell))
    objects = np.array([Calls(os.system, shell)], dtype=object)
    return {
        "REDUCE os.system": b"\x80\2" + name("os", "system") + arguments(text(shell)) + b"R.",
        "REDUCE eval": b"\x80\2" + name("builtins", "eval") + arguments(text(python)) + b"R.",
        "REDUCE exec": b"\x80\2" + name("builtins", "exec") + arguments(text(python)) + b"R.",
        "__builtin__": b"\x80\2" + name("__builtin__", "eval") + arguments(text(python)) + b"R.",
        "STACK_GLOBAL": b"\x80\4" + text("io") + text("open") + b"\x93" + arguments(*write) + b"R.",
        "STACK_GLOBAL dotted": b"\x80\4"
        + text("pathlib")
        + text("Path.touch")
        + b"\x93"
        + arguments(name("pathlib", "Path") + arguments(text(str(mark))) + b"R")
        + b"R.",
        "INST": b"(" + b"".join(write) + b"iio\nopen\n.",
        "OBJ": b"(" + name("io", "FileIO") + b"".join(write) + b"o.",
        "NEWOBJ": b"\x80\2" + name("numpy", "memmap") + arguments(*memmap) + b"\x81.",
        "NEWOBJ_EX": b"\x80\4" + name("numpy", "memmap") + arguments(*memmap) + b"}\x92.",
        "EXT1": b"\x80\2\x82\xf0" + arguments(text(shell)) + b"R.",
        "BUILD __setstate__": b"\x80\2"
        + name("functools", "partial")
        + arguments(name("builtins", "print"))
        + b"R"
        + arguments(name("os", "system"), arguments(text(shell)), b"}", b"N")
        + b"b)R.",
        "numpy.save": b"\x80\2" + name("numpy", "save") + arguments(*memmap[:2]) + b"R.",
        "ndarray.tofile": b"\x80\4"
        + text("numpy")
        + text("ndarray.tofile")
        + b"\x93"
        + arguments(
            name("numpy", "zeros") + arguments(b"K\1") + b"R",
            text(str(mark)),
        )
        + b"R.",
        "a pickle in a pickle": b"\x80\3"
        + name("_pickle", "loads")
        + arguments(raw(nested))
        + b"R.",
        "object array": pickle.dumps({"a": objects}, 4),
        "object array, protocol 2": pickle.dumps([objects], 2),
        "object array, protocol 5": pickle.dumps([objects], 5),
        "object scalar": b"\x80\3"
        + name("numpy.core.multiarray", "scalar")
        + arguments(
            name("numpy", "dtype") + arguments(text("O8"), b"\x89\x88") + b"R",
            name("_pickle", "loads") + arguments(raw(nested)) + b"R",
        )
        + b"R.",
        "hidden among arrays": pickle.dumps(
            {"w": np.ones((3, 2), "f4"), "x": Calls(os.system, shell)}, 4
        ),
        "a key": pickle.dumps({"w": np.ones(2), Calls(os.system, shell): 1}, 4),
    }


def torch_zip(
    path: Path,
    program: bytes,
    members: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """A zip like torch.save's, with this data.pkl."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        for member, data in (members or {"archive/data/0": bytes(24)}).items():
            archive.writestr(member, data)
        archive.writestr("archive/version", "3\n")
    return path


def tensor_program(
    storage: bytes | None = None,
    *,
    offset: int = 0,
    size: tuple[int, ...] = (2, 3),
    stride: tuple[int, ...] = (3, 1),
    count: int = 6,
    key: str = "0",
) -> bytes:
    """data.pkl of one tensor over a storage of six float32."""
    kind = storage or name("torch", "FloatStorage")
    identity = arguments(text("storage"), kind, text(key), text("cpu"), number(count)) + b"Q"
    hooks = name("collections", "OrderedDict") + b")R"
    numbers = [arguments(*map(number, values)) for values in (size, stride)]
    parts = identity, number(offset), *numbers, b"\x89", hooks
    return b"\x80\2" + name("torch._utils", "_rebuild_tensor_v2") + arguments(*parts) + b"R."


def number(value: int) -> bytes:
    """LONG1."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def pickled(value: object, protocol: int) -> bytes:
    """The value's pickle."""
    file = io.BytesIO()
    pickle.dump(value, file, protocol)
    return file.getvalue()
