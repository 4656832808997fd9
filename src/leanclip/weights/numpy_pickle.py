"""Pickles of numpy arrays, read by the interpreter of unpickle.py.

The names that such pickles mention stand for functions of this file, which make arrays over bytes
that were read already.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from leanclip.errors import WeightsError
from leanclip.weights.unpickle import Name, Raw, Unfinished, interpret, refusing, sizes_of

_SHARED = 64 << 20  # bytes
_DTYPES = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}


def read_numpy_pickle(path: str | Path) -> object:
    """Read a pickle of nested dicts, lists and tuples of numbers, strings and numpy arrays.

    Protocols 0 to 5, of any numpy. Arrays are writable and have the pickle's shape and order;
    their dtype is bool, or an integer or float of at most 8 bytes; numpy scalars stay numpy
    scalars, an OrderedDict becomes a dict. What follows the pickle in the file is not read.

    Raises:
        WeightsError: the file is missing or damaged, holds anything else, or asks to call
            anything; nothing is called.
    """
    path = Path(path)
    with refusing(path, "pickle"), path.open("rb") as file:
        return interpret(file, path.stat().st_size, numpy_names())


def numpy_names() -> dict[str, object]:
    """The names that honest pickles of numpy arrays mention, and our functions for them."""
    encoded: dict[str, Raw] = {}  # each string once, or a short file could fill the memory

    def encode(text: object, encoding: object) -> Raw:
        if type(text) is not str or encoding != "latin1":
            raise WeightsError("calls _codecs.encode otherwise than for latin1")
        if text not in encoded:
            data = np.frombuffer(bytearray(text.encode("latin1")), np.uint8)
            encoded[text] = Raw(data)
        return encoded[text]

    names: dict[str, Callable[..., object] | None] = {
        "_codecs.encode": encode,
        "collections.OrderedDict": lambda: {},
        "numpy.dtype": _Dtype,
        "numpy.ndarray": None,
    }
    for core in ("numpy.core", "numpy._core"):
        names[f"{core}.multiarray._reconstruct"] = _Array
        names[f"{core}.multiarray.scalar"] = _scalar
        names[f"{core}.numeric._frombuffer"] = _from_buffer
    for builtins in ("builtins", "__builtin__"):
        names[f"{builtins}.tuple"] = _pair
        names[f"{builtins}.bytes"] = lambda: Raw(np.empty(0, np.uint8))
    return {name: Name(name, call) for name, call in names.items()}


def check_sharing(places: Iterable[tuple[int, int]]) -> None:
    """Refuse values that so many names share that a copy of each would fill the memory.

    Args:
        places: where the values of each name begin in memory, and how many bytes they are.

    Raises:
        WeightsError: they come to over four times what there is, and over 64 MiB.
    """
    total = held = end = 0
    for place, size in sorted(places):
        total += size
        held += max(0, place + size - max(place, end))
        end = max(end, place + size)
    if total > 4 * held + _SHARED:
        raise WeightsError(
            f"{total:,} bytes by name, of which {held:,} are there: too many names share their "
            f"values"
        )


class _Dtype(Unfinished):
    def __init__(self, code: object, align: object = False, copy: object = True) -> None:
        if type(code) is not str or code not in _DTYPES:
            shown = repr(code)[:80] if type(code) is str else type(code).__name__
            what = "Python objects" if shown in ("'O'", "'O4'", "'O8'") else f"dtype {shown}"
            raise WeightsError(f"holds an array of {what}; only plain numbers are read")
        self.dtype = np.dtype(code)

    def build(self, state: object) -> None:
        # (version, byte order, subarray, names, fields, itemsize, alignment, flags[, metadata])
        if type(state) is not tuple or len(state) < 8 or type(state[1]) is not str:
            raise WeightsError("a dtype's state has an unknown form")
        if any(part is not None for part in state[2:5]):
            raise WeightsError("holds an array of a structured dtype; only plain numbers are read")
        if state[1] not in ("<", "|", "="):
            raise WeightsError("holds a big-endian array; only little-endian ones are read")

    def finish(self, inner: Callable[[object], object]) -> object:
        return self.dtype


class _Array(Unfinished):
    """numpy's `_reconstruct`: an empty array, whose state comes with BUILD."""

    def __init__(self, kind: object, shape: object, code: object) -> None:
        if not (isinstance(kind, Name) and kind.name == "numpy.ndarray"):
            raise WeightsError("reconstructs an array of a type that is not numpy.ndarray")
        self.array: np.ndarray | None = None

    def build(self, state: object) -> None:
        # ([version,] shape, dtype, is it in Fortran's order, values)
        if type(state) is not tuple or len(state) not in (4, 5):
            raise WeightsError("an array's state has an unknown form")
        shape, dtype, is_fortran, data = state[-4:]
        order = "F" if type(is_fortran) in (bool, int) and is_fortran else "C"
        self.array = _as_raw(data).view(_as_dtype(dtype), shape, order)

    def finish(self, inner: Callable[[object], object]) -> object:
        if self.array is None:
            raise WeightsError("an array is left without its values")
        return self.array


def _scalar(dtype: object, data: object) -> object:
    return _as_raw(data).view(_as_dtype(dtype), (), "C")[()]


def _from_buffer(
    data: object, dtype: object, shape: object, order: object, axes: object = None
) -> np.ndarray:
    array = _as_raw(data).view(_as_dtype(dtype), shape, "F" if order == "F" else "C")
    if axes is None:
        return array
    sizes = sizes_of(axes)
    if sorted(sizes) != list(range(array.ndim)):
        raise WeightsError(f"an array's axes are {sizes}")
    return array.transpose(sizes)


def _pair(items: object) -> tuple:
    """Paddle's (name, array); short, because each call copies the list."""
    if type(items) not in (list, tuple) or len(items) > 64:  # type: ignore[arg-type]
        raise WeightsError("calls tuple otherwise than for a few values")
    return tuple(items)  # type: ignore[arg-type]


def _as_raw(data: object) -> Raw:
    if type(data) is str and len(data) < 256:  # Python 2's SHORT_BINSTRING
        return Raw(np.frombuffer(bytearray(data.encode("latin1")), np.uint8))
    if not isinstance(data, Raw):
        raise WeightsError(f"an array's values are a {type(data).__name__}, not bytes")
    return data


def _as_dtype(dtype: object) -> np.dtype:
    if not isinstance(dtype, _Dtype):
        raise WeightsError(f"an array's dtype is a {type(dtype).__name__}")
    return dtype.dtype
