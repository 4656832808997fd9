"""Read arrays out of untrusted pickles without running them.

A pickle is a program for a small stack machine whose REDUCE instruction calls any function by
name. `interpret` is that machine with no functions but the few of ours that a table names:

    file -> interpret: stack, memo, table of allowed names -> dicts, lists, numbers, arrays

Python's own Unpickler is not enough, even with `find_class` overridden: before it looks up any
name, nine bytes make it allocate gigabytes (the memo's index), and two megabytes crash the
interpreter (hashing a deeply nested tuple as a dict's key). `torch.load(weights_only=True)` reads
neither PaddlePaddle's pickles nor TorchScript, the form of OpenAI's published weights, and a few
hundred bytes make it fill the memory (`_codecs.encode` to hexadecimal, again and again). Here no
allocation is larger than what is left of the file, and dict keys are plain.
"""

import math
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from leanclip.errors import WeightsError

_MAX_OPERATIONS = 5_000_000  # a ViT-L/14 with its optimiser takes about 50,000
_MAX_NAME_LENGTH = 1000
_MAX_PATH_LENGTH = 500  # of a tensor's name with its dicts or modules: names multiply
_MAX_SHARED_BYTES = 64 << 20
_DTYPES = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}
# What parsing something damaged raises; RecursionError and torch's errors are RuntimeErrors.
_DAMAGE = (EOFError, OSError, ValueError, TypeError, LookupError, ArithmeticError)
_DAMAGE += (AttributeError, MemoryError, RuntimeError, struct.error, zipfile.BadZipFile)


@contextmanager
def weights_errors(path: Path, kind: str) -> Iterator[None]:
    """Turn what goes wrong while reading `path` into a one-line WeightsError that names it."""
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except (FileNotFoundError, IsADirectoryError):
        raise WeightsError(f"{path}: no such file") from None
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:200] or "no reason given"
        raise WeightsError(f"{path}: damaged {kind}: {type(error).__name__}: {reason}") from None


def read_numpy_pickle(path: str | Path) -> object:
    """Read a pickle of nested dicts, lists and tuples of numbers, strings and numpy arrays.

    Protocols 2 to 5, of any numpy. Arrays are writable and have the pickle's shape and order;
    their dtype is bool, or an integer or float of at most 8 bytes; numpy scalars stay numpy
    scalars, an OrderedDict becomes a dict. What follows the pickle in the file is not read.

    Raises:
        WeightsError: the file is missing or damaged, or mentions anything else by name.
    """
    path = Path(path)
    with weights_errors(path, "pickle"), path.open("rb") as file:
        return interpret(file, path.stat().st_size, numpy_names())


def check_sharing(places: Iterable[tuple[int, int]]) -> None:
    """Refuse tensors that share their values so often that a copy of each would fill the memory.

    Args:
        places: where the values of each tensor begin in memory, and how many bytes they take.

    Raises:
        WeightsError: together they have over four times the bytes in memory, and over 64 MiB.
    """
    total = present = end = 0
    for place, size in sorted(places):
        total += size
        present += max(0, place + size - max(place, end))
        end = max(end, place + size)
    if total > 4 * present + _MAX_SHARED_BYTES:
        raise WeightsError(
            f"{total:,} bytes of tensors in {present:,} bytes of values: too many share them"
        )


def check_path(path: str) -> str:
    """The path of a tensor or dict in a file.

    Raises:
        WeightsError: it is too long: a long name before each of many short ones fills the memory.
    """
    if len(path) > _MAX_PATH_LENGTH:
        raise WeightsError(f"the name {path[:60]!r}... is over {_MAX_PATH_LENGTH} characters long")
    return path


@dataclass(frozen=True, slots=True, eq=False)
class Name:
    """A global name in a pickle: inert, or with a function of ours to call in its place."""

    name: str
    call: Callable[..., object] | None = None


@dataclass(eq=False)
class Module:
    """An object of a TorchScript file: its attributes by name, without its code."""

    attributes: dict = field(default_factory=dict, init=False)


def _no_persistent(identity: object) -> object:
    raise WeightsError("refers to data outside the pickle")


def interpret(
    file: BinaryIO,
    size: int,
    names: Mapping[str, object],
    persistent: Callable[[object], object] = _no_persistent,
) -> object:
    """Follow a pickle's instructions and return the value they build.

    Args:
        file: at the start of the pickle.
        size: bytes from there to the end; never more is read or allocated.
        names: a Name or a value for each allowed `module.name`; others are refused.
        persistent: the value of a persistent id.

    Raises:
        WeightsError: an instruction asks for what is not allowed.
        Exception: one of those that `weights_errors` turns into a WeightsError: damage.
    """
    read = _Reader(file, size)
    memo: dict[int, object] = {}
    stack: list = []
    below: list[list] = []  # the stacks under the marks
    for _ in range(_MAX_OPERATIONS):
        match code := read.take(1):
            case _ if code in _VALUES:
                stack.append(_VALUES[code](read))
            case b"\x94":  # MEMOIZE
                memo[len(memo)] = stack[-1]
            case b"q" | b"r":  # BINPUT, LONG_BINPUT
                memo[read.number(1 if code == b"q" else 4)] = stack[-1]
            case b"h" | b"j":  # BINGET, LONG_BINGET
                stack.append(memo[read.number(1 if code == b"h" else 4)])
            case b"(":  # MARK
                below.append(stack)
                stack = []
            case b"t" | b"e" | b"u":  # TUPLE, APPENDS, SETITEMS: all above the mark
                items, stack = stack, below.pop()
                _collect(code, items, stack)
            case b"\x85" | b"\x86" | b"\x87" | b"a" | b"s":  # TUPLE1 to 3, APPEND, SETITEM
                _collect(code, _pop(stack, _COUNTS[code]), stack)
            case b"c":  # GLOBAL
                stack.append(_find(names, read.line(), read.line()))
            case b"\x93":  # STACK_GLOBAL
                stack.append(_find(names, *_pop(stack, 2)))
            case b"R" | b"\x81":  # REDUCE, NEWOBJ
                stack.append(_call(*_pop(stack, 2)))
            case b"b":  # BUILD
                state = stack.pop()
                _build(stack[-1], state)
            case b"Q":  # BINPERSID
                stack.append(persistent(stack.pop()))
            case b"\x80":  # PROTO
                read.take(1)  # later protocols have other instructions, which are refused
            case b"\x95":  # FRAME
                read.check(read.number(8))
            case b".":  # STOP
                return stack.pop()
            case _:
                raise WeightsError(f"pickle instruction {code!r} has no place in a weights file")
    raise WeightsError(f"more than {_MAX_OPERATIONS:,} pickle instructions")


class _Reader:
    """The bytes of a pickle; none are allocated that the file does not hold."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = size

    def check(self, count: int) -> None:
        if count > self._left:
            raise EOFError(f"truncated: {count} more bytes promised, {self._left} left")

    def take(self, count: int) -> bytes:
        self.check(count)
        self._left -= count
        data = self._file.read(count)
        if len(data) != count:
            raise EOFError("truncated")
        return data

    def number(self, width: int, *, signed: bool = False) -> int:
        return int.from_bytes(self.take(width), "little", signed=signed)

    def counted(self, width: int) -> bytes:
        """Bytes after their count, a number of `width` bytes."""
        return self.take(self.number(width))

    def line(self) -> str:
        data = self._file.readline(min(_MAX_NAME_LENGTH, self._left))
        self._left -= len(data)
        if not data.endswith(b"\n"):
            raise EOFError("a line without an end")
        return data[:-1].decode()


_VALUES: dict[bytes, Callable[[_Reader], object]] = {  # instructions that push a value
    b"N": lambda read: None,
    b"\x88": lambda read: True,
    b"\x89": lambda read: False,
    b"K": lambda read: read.number(1),  # BININT1
    b"M": lambda read: read.number(2),  # BININT2
    b"J": lambda read: read.number(4, signed=True),  # BININT
    b"\x8a": lambda read: read.number(read.number(1), signed=True),  # LONG1
    b"G": lambda read: struct.unpack(">d", read.take(8))[0],  # BINFLOAT
    b"\x8c": lambda read: read.counted(1).decode(),  # SHORT_BINUNICODE
    b"X": lambda read: read.counted(4).decode(),  # BINUNICODE
    b"\x8d": lambda read: read.counted(8).decode(),  # BINUNICODE8
    b"C": lambda read: read.counted(1),  # SHORT_BINBYTES
    b"B": lambda read: read.counted(4),  # BINBYTES
    b"\x8e": lambda read: read.counted(8),  # BINBYTES8
    b"\x96": lambda read: bytearray(read.counted(8)),  # BYTEARRAY8
    b")": lambda read: (),
    b"]": lambda read: [],
    b"}": lambda read: {},
}
_COUNTS = {b"\x85": 1, b"\x86": 2, b"\x87": 3, b"a": 1, b"s": 2}  # the values that each takes


def _pop(stack: list, count: int) -> list:
    if len(stack) < count:
        raise IndexError("the stack is empty")
    items = stack[-count:]
    del stack[-count:]
    return items


def _collect(code: bytes, items: list, stack: list) -> None:
    """Put items into a new tuple, or into the list or dict on top of the stack."""
    if code not in b"aesu":
        stack.append(tuple(items))
    elif code in b"ae":
        if type(stack[-1]) is not list:
            raise WeightsError(f"appends to a {type(stack[-1]).__name__}")
        stack[-1].extend(items)
    else:
        if type(stack[-1]) is not dict or len(items) % 2:
            raise WeightsError(f"sets items of a {type(stack[-1]).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # No tuples: hashing one that is nested deep or shared often crashes or hangs Python.
            if key is not None and type(key) not in (str, int, float, bool):
                raise WeightsError(f"a dict's key is a {type(key).__name__}")
            stack[-1][key] = value


def _find(names: Mapping[str, object], module: object, name: object) -> object:
    if type(module) is not str or type(name) is not str:
        raise WeightsError("a global's name is not text")
    full = f"{module}.{name}"
    try:
        return names[full]
    except KeyError:
        shown = full if full.isprintable() else repr(full)
        raise WeightsError(f"refused: names {shown:.100}, which is not data") from None


def _call(callee: object, arguments: object) -> object:
    if not isinstance(callee, Name) or callee.call is None or type(arguments) is not tuple:
        what = callee.name if isinstance(callee, Name) else f"a {type(callee).__name__}"
        raise WeightsError(f"refused: calls {what}, which is not a function of data")
    return callee.call(*arguments)


def _build(target: object, state: object) -> None:
    if isinstance(target, Module) and type(state) is dict:
        target.attributes = state
    elif isinstance(target, np.dtype):
        _check_dtype_state(state)
    elif isinstance(target, np.ndarray):
        _fill_array(target, state)
    elif type(target) is not dict:  # a dict's state is an OrderedDict's attributes: `_metadata`
        raise WeightsError(f"refused: sets the state of a {type(target).__name__}")


def numpy_names() -> dict[str, object]:
    """The names that pickles of numpy arrays mention, and our functions for them."""
    encoded: dict[str, bytes] = {}  # each string once, or a short file could fill the memory

    def encode(text: object, encoding: object) -> bytes:
        if type(text) is not str or encoding != "latin1":
            raise WeightsError("calls _codecs.encode otherwise than for latin1")
        if text not in encoded:
            encoded[text] = text.encode("latin1")
        return encoded[text]

    names: dict[str, Callable[..., object] | None] = {
        "_codecs.encode": encode,
        "collections.OrderedDict": lambda: {},
        "numpy.dtype": _dtype,
        "numpy.ndarray": None,
    }
    for core in ("numpy.core", "numpy._core"):
        names[f"{core}.multiarray._reconstruct"] = _empty_array
        names[f"{core}.multiarray.scalar"] = _scalar
        names[f"{core}.numeric._frombuffer"] = _from_buffer
    for builtins in ("builtins", "__builtin__"):
        names[f"{builtins}.tuple"] = _short_tuple
        names[f"{builtins}.bytes"] = lambda: b""
    return {name: Name(name, call) for name, call in names.items()}


def _dtype(code: object, align: object = False, copy: object = True) -> np.dtype:
    if type(code) is not str or code not in _DTYPES:
        shown = repr(code)[:80] if type(code) is str else type(code).__name__
        what = "Python objects" if shown in ("'O'", "'O4'", "'O8'") else f"dtype {shown}"
        raise WeightsError(f"holds an array of {what}; only plain numbers are read")
    return np.dtype(code)


def _check_dtype_state(state: object) -> None:
    # (version, byte order, subarray, names, fields, itemsize, alignment, flags[, metadata])
    if type(state) is not tuple or len(state) < 8 or type(state[1]) is not str:
        raise WeightsError("a dtype's state has an unknown form")
    if any(part is not None for part in state[2:5]):
        raise WeightsError("holds an array of a structured dtype; only plain numbers are read")
    if state[1] not in ("<", "|", "="):
        raise WeightsError("holds a big-endian array; only little-endian ones are read")


def _empty_array(kind: object, shape: object, code: object) -> np.ndarray:
    """numpy's `_reconstruct`: BUILD gives the array its shape and values."""
    if not (isinstance(kind, Name) and kind.name == "numpy.ndarray"):
        raise WeightsError("reconstructs an array of a type that is not numpy.ndarray")
    return np.empty(0, np.int8)


def _fill_array(array: np.ndarray, state: object) -> None:
    # (version, shape, dtype, is it in Fortran's order, values)
    if type(state) is not tuple or len(state) != 5 or array.size:
        raise WeightsError("an array's state has an unknown form")
    _, shape, dtype, is_fortran, data = state
    dtype, data = _check_values(dtype, shape, data)
    if type(data) is not bytes:  # a bytearray would be copied for each array over it
        raise WeightsError("an array's state has an unknown form")
    # numpy takes the bytes over, writable and without a copy; short ones it copies.
    array.__setstate__((1, shape, dtype, bool(is_fortran), data))  # type: ignore[arg-type]


def _scalar(dtype: object, data: object) -> object:
    dtype, data = _check_values(dtype, (), data)
    return np.frombuffer(data, dtype)[0]


def _from_buffer(
    data: object, dtype: object, shape: object, order: object, axes: object = None
) -> np.ndarray:
    is_fortran = type(order) is str and order == "F"
    if type(data) is bytes:
        array = np.empty(0, np.int8)
        _fill_array(array, (1, shape, dtype, is_fortran, data))
    else:
        dtype, data = _check_values(dtype, shape, data)
        array = np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")  # type: ignore[arg-type]
    return array if axes is None else array.transpose(axes)  # type: ignore[arg-type]


def _short_tuple(items: object) -> tuple:
    """Paddle's (name, array); short, because each call copies the list."""
    if type(items) not in (list, tuple) or len(items) > 64:  # type: ignore[arg-type]
        raise WeightsError("calls tuple otherwise than for a few values")
    return tuple(items)  # type: ignore[arg-type]


def _check_values(dtype: object, shape: object, data: object) -> tuple[np.dtype, bytes | bytearray]:
    """See that `data` has exactly the bytes of an array of this dtype and shape."""
    if not isinstance(dtype, np.dtype):
        raise WeightsError(f"an array's dtype is a {type(dtype).__name__}")
    if not isinstance(data, bytes | bytearray):
        raise WeightsError(f"an array's values are a {type(data).__name__}, not bytes")
    sizes = shape if isinstance(shape, tuple) and len(shape) <= 64 else (-1,)
    if any(type(n) is not int or n < 0 for n in sizes):
        raise WeightsError("an array's shape is not a tuple of sizes")
    if math.prod(sizes) * dtype.itemsize != len(data):
        raise WeightsError(f"{len(data)} bytes given for {dtype} of shape {shape!s:.80}")
    return dtype, data
