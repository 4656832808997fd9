"""The files of weights: told apart by their first bytes; safetensors and JSON, read with care."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from leanclip.errors import WeightsError, one_line
from leanclip.io.files import LFS_POINTER, is_lfs_file
from leanclip.weights.unpickle import weights_errors

MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)  # of wrong values
INDEX = ".index.json"  # ends the name of a file that lists shards
# torch.save's magic number, 0x1950a86a20f9469cfc6c, as a pickle.
_TORCH_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_OTHERS = (
    (b"version https://git-lfs", LFS_POINTER),
    (b"<", "a web page or XML, perhaps an error page saved by a download: download it again"),
    (b"{", "a JSON file; an index of shards and a config hold no weights"),
    (b"\x1f\x8b", "a gzip file: unpack it first"),
    (b"PK\5\6", "an empty zip"),
    (b"\x89HDF", "an HDF5 file of Keras or TensorFlow, which leanclip does not read"),
    (b"\x93NUMPY", "a single numpy array"),
    (b"GGUF", "a GGUF file, which leanclip does not read"),
)


def sniff(path: str | Path) -> Literal["safetensors", "zip", "pickle", "torch-legacy"]:
    """The kind of a file, by its content alone.

    Raises:
        WeightsError: the file is missing, empty or something else; names what.
    """
    path = Path(path)
    with weights_errors(path, "file"), path.open("rb") as file:
        head = file.read(64)
        size = path.stat().st_size
    if not head:
        raise WeightsError(f"{path}: empty; was it downloaded completely?")
    if head.startswith(b"PK\3\4"):
        return "zip"
    if head[8:9] == b"{" and 8 + int.from_bytes(head[:8], "little") <= size:
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "torch-legacy" if head[2:].startswith(_TORCH_LEGACY) else "pickle"
    for start, what in _OTHERS:
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(start):
            raise WeightsError(f"{path}: {what}")
    raise WeightsError(
        f"{path}: not a known kind of weights file: it starts with {head[:8]!r} (known are "
        f"safetensors, PyTorch's zips and pickles, and PaddlePaddle's .pdparams)"
    )


def read_safetensors(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by name.

    Raises:
        WeightsError: the file is missing or damaged: its header, or offsets that overlap,
            leave gaps or end outside the file.
    """
    path = Path(path)
    with weights_errors(path, "safetensors file"):
        if is_lfs_file(path):
            raise WeightsError(LFS_POINTER)
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise WeightsError(f"damaged safetensors file: {one_line(error)}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        WeightsError: it is missing or no object.
    """
    if is_lfs_file(path):
        raise WeightsError(f"{path}: {LFS_POINTER}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise WeightsError(f"{path}: holds no JSON object")
    return values


def find_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of some files of weights that a folder holds, or the index of its shards."""
    both = (folder / name for file in names for name in (file, file + INDEX))
    return next((path for path in both if path.is_file()), None)
