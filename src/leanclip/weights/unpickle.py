"""Read values and arrays out of other people's pickles without running them.

A pickle is a program for a small stack machine whose REDUCE calls any function by name. This
is that machine with nothing to call:

    file -> interpret: stack, memo, a table of the few names allowed -> plain values

A name is looked up in the caller's table of our own functions (numpy_pickle.py has those of
arrays), or the file is refused; nothing is imported, no attribute is read or set. Python's own
Unpickler with `find_class` overridden is not enough: before it looks up any name, nine bytes make
it allocate gigabytes (the memo's index) and two megabytes crash the interpreter (hashing a deep
tuple, a dict's key). Here no allocation is larger than what is left of the file, and dict keys are
plain. Bytes are read straight into the memory that the arrays keep.
"""

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from leanclip.errors import WeightsError

_MAX_OPERATIONS = 5_000_000  # a ViT-L/14 with its optimiser takes about 50,000
_MAX_DEPTH = 100
_MAX_NAME_LENGTH = 1000
# What parsing something damaged raises; RecursionError and torch's errors are RuntimeErrors.
_DAMAGE = (EOFError, OSError, ValueError, TypeError, LookupError, ArithmeticError)
_DAMAGE += (MemoryError, RuntimeError, struct.error)


@contextmanager
def refusing(path: Path, kind: str) -> Iterator[None]:
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


@dataclass(frozen=True, slots=True, eq=False)
class Name:
    """A global name that a pickle mentioned: inert, but for a function of ours behind it."""

    name: str
    call: Callable[..., object] | None = None


class Unfinished:
    """A value that later instructions complete, and that ends as what `finish` returns."""

    def build(self, state: object) -> None:
        """Take the state that BUILD gives."""
        raise WeightsError(f"sets the state of a {type(self).__name__}")

    def finish(self, inner: Callable[[object], object]) -> object:
        """The plain value; `inner` finishes what it holds."""
        raise NotImplementedError


class Raw(Unfinished):
    """Bytes in memory of their own, (n,) uint8, that arrays are views of."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data
        self._is_boolean: bool | None = None

    def view(self, dtype: np.dtype, shape: object, order: str) -> np.ndarray:
        """An array over exactly these bytes."""
        sizes = sizes_of(shape)
        if math.prod(sizes) * dtype.itemsize != self.data.size:
            raise WeightsError(f"{self.data.size} bytes given for {dtype} of shape {sizes}")
        if dtype == np.bool_ and self._is_boolean is None:
            self._is_boolean = self.data.size == 0 or int(self.data.max()) <= 1
        if dtype == np.bool_ and not self._is_boolean:
            raise WeightsError("a boolean array holds other bytes than 0 and 1")
        return np.ndarray(sizes, dtype, self.data, order="F" if order == "F" else "C")

    def finish(self, inner: Callable[[object], object]) -> object:
        """Bytes."""
        return self.data.tobytes()


def interpret(
    file: BinaryIO,
    size: int,
    names: Mapping[str, object],
    persistent: Callable[[object], object] | None = None,
) -> object:
    """Follow a pickle's instructions and return the plain value they make.

    Args:
        file: at the start of the pickle.
        size: bytes from there to the end; never more is read or allocated.
        names: what `module.name` stands for: a Name, or a value. Others are refused.
        persistent: what a persistent id stands for; without it they are refused.

    Raises:
        WeightsError: an instruction asks for what is not allowed.
        Exception: one of those that `refusing` turns into a WeightsError: damage.
    """
    read = _Reader(file, size)
    memo: dict[int, object] = {}
    stack: list = []
    below: list[list] = []  # the stacks under the marks
    for _ in range(_MAX_OPERATIONS):
        match read.take(1):
            # The memo.
            case b"\x94":  # MEMOIZE
                memo[len(memo)] = stack[-1]
            case b"q" | b"r" as code:  # BINPUT, LONG_BINPUT
                memo[read.number("<B" if code == b"q" else "<I")] = stack[-1]
            case b"h" | b"j" as code:  # BINGET, LONG_BINGET
                stack.append(memo[read.number("<B" if code == b"h" else "<I")])
            case b"p":  # PUT
                memo[int(read.line())] = stack[-1]
            case b"g":  # GET
                stack.append(memo[int(read.line())])
            # Scalars.
            case b"N":
                stack.append(None)
            case b"\x88":
                stack.append(True)
            case b"\x89":
                stack.append(False)
            case b"K":  # BININT1
                stack.append(read.number("<B"))
            case b"M":  # BININT2
                stack.append(read.number("<H"))
            case b"J":  # BININT
                stack.append(read.number("<i"))
            case b"\x8a" | b"\x8b" as code:  # LONG1, LONG4
                length = read.number("<B" if code == b"\x8a" else "<I")
                if length > 255:
                    raise WeightsError(f"an integer of {length} bytes")
                stack.append(int.from_bytes(read.take(length), "little", signed=True))
            case b"I" | b"L" as code:  # INT, LONG; protocol 0 writes booleans as 00 and 01
                digits = read.line().removesuffix(b"L")
                is_flag = code == b"I" and digits in (b"00", b"01")
                stack.append(digits == b"01" if is_flag else int(digits))
            case b"F":
                stack.append(float(read.line()))
            case b"G":  # BINFLOAT
                stack.append(read.number(">d"))
            # Text and bytes.
            case b"\x8c":  # SHORT_BINUNICODE
                stack.append(read.take(read.number("<B")).decode())
            case b"X":  # BINUNICODE
                stack.append(read.take(read.number("<I")).decode())
            case b"\x8d":  # BINUNICODE8
                stack.append(read.take(read.number("<Q")).decode())
            case b"V":  # UNICODE, protocol 0: a line of any length
                stack.append(read.line(size).decode("raw-unicode-escape"))
            case b"U":  # SHORT_BINSTRING: Python 2's names, and the bytes of small arrays
                stack.append(read.take(read.number("<B")).decode("latin1"))
            case b"C":  # SHORT_BINBYTES
                stack.append(read.raw(read.number("<B")))
            case b"B" | b"T":  # BINBYTES, BINSTRING: Python 2's longer bytes
                stack.append(read.raw(read.number("<I")))
            case b"\x8e" | b"\x96":  # BINBYTES8, BYTEARRAY8
                stack.append(read.raw(read.number("<Q")))
            # Containers.
            case b"(":  # MARK
                below.append(stack)
                stack = []
            case b")":
                stack.append(())
            case b"\x85" | b"\x86" | b"\x87" as code:  # TUPLE1, TUPLE2, TUPLE3
                stack[-(code[0] - 0x84) :] = [tuple(_top(stack, code[0] - 0x84))]
            case b"t":  # TUPLE
                items, stack = stack, below.pop()
                stack.append(tuple(items))
            case b"]":
                stack.append([])
            case b"l":  # LIST
                items, stack = stack, below.pop()
                stack.append(items)
            case b"a":  # APPEND
                item = stack.pop()
                _extend(stack[-1], [item])
            case b"e":  # APPENDS
                items, stack = stack, below.pop()
                _extend(stack[-1], items)
            case b"}":
                stack.append({})
            case b"d":  # DICT
                items, stack = stack, below.pop()
                stack.append({})
                _update(stack[-1], items)
            case b"s":  # SETITEM
                value, key = stack.pop(), stack.pop()
                _update(stack[-1], [key, value])
            case b"u":  # SETITEMS
                items, stack = stack, below.pop()
                _update(stack[-1], items)
            # Names, and what is done with them.
            case b"c":  # GLOBAL
                stack.append(_find(names, read.line().decode(), read.line().decode()))
            case b"\x93":  # STACK_GLOBAL
                name, module = stack.pop(), stack.pop()
                stack.append(_find(names, module, name))
            case b"R" | b"\x81":  # REDUCE, NEWOBJ
                arguments, callee = stack.pop(), stack.pop()
                stack.append(_call(callee, arguments))
            case b"b":  # BUILD
                state = stack.pop()
                _build(stack[-1], state)
            case b"Q":  # BINPERSID
                if persistent is None:
                    raise WeightsError("refers to data outside the pickle")
                stack.append(persistent(stack.pop()))
            # The machine.
            case b"\x80":  # PROTO
                if (protocol := read.number("<B")) > 5:
                    raise WeightsError(f"pickle protocol {protocol}; 0 to 5 are read")
            case b"\x95":  # FRAME
                read.check(read.number("<Q"))
            case b"0":  # POP
                if stack:
                    stack.pop()
                else:
                    stack = below.pop()
            case b"1":  # POP_MARK
                stack = below.pop()
            case b"2":  # DUP
                stack.append(stack[-1])
            case b".":  # STOP
                return _finish(stack.pop(), {}, 0)
            case code:
                raise WeightsError(f"pickle instruction {code!r} has no place in a file of weights")
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

    def raw(self, count: int) -> Raw:
        # numpy's own way: a writable array over the bytes that nobody else has; it copies short
        # ones. Reading into np.empty, whose huge pages are slow at first, takes a third longer.
        data = np.empty(0, np.uint8)
        state = (1, (count,), data.dtype, False, self.take(count))
        data.__setstate__(state)  # type: ignore[arg-type]  # a plain bool is what it takes
        return Raw(data)

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self, most: int = _MAX_NAME_LENGTH) -> bytes:
        data = self._file.readline(min(most, self._left))
        self._left -= len(data)
        if not data.endswith(b"\n"):
            raise EOFError("a line without an end")
        return data[:-1]


def _top(stack: list, count: int) -> list:
    if len(stack) < count:
        raise IndexError("the stack is empty")
    return stack[-count:]


def _extend(target: object, items: list) -> None:
    if type(target) is not list:
        raise WeightsError(f"appends to a {type(target).__name__}")
    target.extend(items)


def _update(target: object, items: list) -> None:
    if type(target) is not dict or len(items) % 2:
        raise WeightsError(f"sets items of a {type(target).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Not tuples: hashing one that is nested deep or shared often crashes or hangs Python.
        if key is not None and type(key) not in (str, int, float, bool):
            raise WeightsError(f"a dict's key is a {type(key).__name__}")
        target[key] = value


def _find(names: Mapping[str, object], module: object, name: object) -> object:
    if type(module) is not str or type(name) is not str:
        raise WeightsError("a global's name is not text")
    try:
        return names[f"{module}.{name}"]
    except KeyError:
        full = f"{module}.{name}"
        shown = full if full.isprintable() else repr(full)
        raise WeightsError(f"refused: names {shown:.100}, which is not data") from None


def _call(callee: object, arguments: object) -> object:
    if not isinstance(callee, Name) or callee.call is None or type(arguments) is not tuple:
        what = callee.name if isinstance(callee, Name) else f"a {type(callee).__name__}"
        raise WeightsError(f"refused: calls {what}, which is not a function of data")
    return callee.call(*arguments)


def _build(target: object, state: object) -> None:
    if isinstance(target, Unfinished):
        target.build(state)
    elif type(target) is not dict:  # a dict's is an OrderedDict's attributes: `_metadata`
        raise WeightsError(f"refused: sets the state of a {type(target).__name__}")


def _finish(value: object, done: dict[int, object], depth: int) -> object:
    """The value with every part finished; what is shared stays shared."""
    if isinstance(value, Name):
        raise WeightsError(f"holds the name {value.name:.100}, which is not data")
    if not isinstance(value, dict | list | tuple | Unfinished):
        return value
    if depth > _MAX_DEPTH:
        raise WeightsError(f"values are nested more than {_MAX_DEPTH} deep")
    if id(value) in done:
        if done[id(value)] is _UNDERWAY:
            raise WeightsError("a value contains itself")
        return done[id(value)]
    done[id(value)] = _UNDERWAY

    def inner(part: object) -> object:
        return _finish(part, done, depth + 1)

    result: object
    if isinstance(value, Unfinished):
        result = value.finish(inner)
    elif isinstance(value, dict):
        result = {key: inner(part) for key, part in value.items()}
    else:
        parts = [inner(part) for part in value]
        result = tuple(parts) if type(value) is tuple else parts
    done[id(value)] = result
    return result


_UNDERWAY = object()


def sizes_of(shape: object) -> tuple[int, ...]:
    """The sizes that a pickle gives as an array's shape."""
    if type(shape) is int:  # numpy takes n for (n,)
        shape = (shape,)
    if not (
        type(shape) is tuple and len(shape) <= 64 and all(type(n) is int and n >= 0 for n in shape)
    ):
        raise WeightsError("an array's shape is not a tuple of sizes")
    return shape
