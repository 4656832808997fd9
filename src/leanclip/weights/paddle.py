"""Find the parameters in what PaddlePaddle and PASSL wrote into a `.pdparams`.

loaded pickle -> the state dict -> without tables and tuples -> slices joined -> name: array
"""

import math
from pathlib import Path

import numpy as np

from leanclip.errors import WeightsError
from leanclip.weights.numpy_pickle import check_sharing
from leanclip.weights.unpickle import refusing

_NAME_TABLE = "StructuredToParameterName@@"
_SLICE_TABLE = "UnpackBigParamInfor@@"


def paddle_arrays(loaded: object, source: str | Path = ".pdparams") -> dict[str, np.ndarray]:
    """The parameters by name, in Paddle's own shapes.

    Knows the forms of paddle.save, bare or under `state_dict` in a training checkpoint of
    either generation of PASSL: values that are (name, array), arrays over 1 GiB in slices, and
    bfloat16 as the bits in a uint16, which becomes float32. The prefix `model.` is stripped
    where all names have it.

    Args:
        loaded: what `read_numpy_pickle` gave.
        source: the file that errors name.

    Raises:
        WeightsError: the values have another form.
    """
    if type(loaded) is dict and type(loaded.get("state_dict")) is dict:
        loaded = loaded["state_dict"]
    if type(loaded) is not dict:
        raise WeightsError(f"{source}: holds a {type(loaded).__name__}, not a dict of parameters")
    arrays = {
        name: _array(name, value, source)
        for name, value in loaded.items()
        if name not in (_NAME_TABLE, _SLICE_TABLE)
    }
    with refusing(Path(source), "pickle"):
        check_sharing((a.__array_interface__["data"][0], a.nbytes) for a in arrays.values())
    for name, facts in _slice_table(loaded, source).items():
        arrays[name] = _joined(name, facts, arrays, source)
    if not arrays:
        raise WeightsError(f"{source}: holds no parameters")
    arrays = {name: _from_bfloat16(array) for name, array in arrays.items()}
    if all(name.startswith("model.") for name in arrays):
        arrays = {name.removeprefix("model."): array for name, array in arrays.items()}
    return arrays


def _array(name: object, value: object, source: str | Path) -> np.ndarray:
    if type(value) is tuple and len(value) == 2 and type(value[0]) is str:
        value = value[1]
    if type(name) is not str or not isinstance(value, np.ndarray):
        raise WeightsError(
            f"{source}: {str(name)[:100]!r} holds a {type(value).__name__}, not an array"
        )
    return value


def _slice_table(loaded: dict, source: str | Path) -> dict:
    table = loaded.get(_SLICE_TABLE, {})
    if type(table) is not dict or not all(type(name) is str for name in table):
        raise WeightsError(f"{source}: {_SLICE_TABLE} is not a table of names")
    return table


def _joined(
    name: str, facts: object, arrays: dict[str, np.ndarray], source: str | Path
) -> np.ndarray:
    """One array out of its slices, which leave `arrays`."""
    shape = facts.get("OriginShape") if isinstance(facts, dict) else None
    names = facts.get("slices") if isinstance(facts, dict) else None
    if not (
        isinstance(shape, tuple | list)
        and isinstance(names, tuple | list)
        and all(type(n) is int and n >= 0 for n in shape)
        and all(type(part) is str and part in arrays for part in names)
        and len(set(names)) == len(names) > 0
        and name not in arrays
    ):
        raise WeightsError(f"{source}: the slices of {name[:100]!r} are missing or unclear")
    parts = [arrays.pop(part).ravel() for part in names]
    if len({part.dtype for part in parts}) > 1 or sum(map(len, parts)) != math.prod(shape):
        raise WeightsError(f"{source}: the slices of {name[:100]!r} do not make {tuple(shape)}")
    return np.concatenate(parts).reshape(shape)


def _from_bfloat16(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint16:
        return array
    # Not astype(...) << 16 on the array itself: a 0-d one would turn into a scalar.
    bits = np.left_shift(array, 16, dtype=np.uint32)
    return np.asarray(bits).view(np.float32)
