"""Tell by its first bytes what a file of weights is; read safetensors with care."""

from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open

from leanclip.errors import WeightsError, one_line
from leanclip.io.files import LFS_POINTER, is_lfs_file
from leanclip.weights.unpickle import refusing

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit, in bytes
# torch.save's magic number, 0x1950a86a20f9469cfc6c, as a pickle.
_TORCH_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_OLD_PICKLES = (b"(d", b"(l", b"}q", b"}(", b"}.", b"]q", b"](", b"ccollections\n", b"cnumpy")
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
    """What a file is, by its content alone.

    Raises:
        WeightsError: the file is missing, empty or something else; says what.
    """
    path = Path(path)
    with refusing(path, "file"), path.open("rb") as file:
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
    if head.startswith(_OLD_PICKLES):
        return "pickle"
    for start, what in _OTHERS:
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(start):
            raise WeightsError(f"{path}: {what}")
    raise WeightsError(
        f"{path}: no file of weights that leanclip knows: it starts with {head[:8]!r} (known are "
        f"safetensors, PyTorch's zips and pickles, and PaddlePaddle's .pdparams)"
    )


def read_safetensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata.

    Raises:
        WeightsError: the file is missing or damaged: its header, or offsets that overlap,
            leave gaps or end outside the file.
    """
    path = Path(path)
    with refusing(path, "safetensors file"):
        _check_header(path)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return tensors, dict(file.metadata() or {})
        except SafetensorError as error:
            raise WeightsError(f"damaged safetensors file: {one_line(error)}") from None


def _check_header(path: Path) -> None:
    size = path.stat().st_size
    if is_lfs_file(path):
        raise WeightsError(LFS_POINTER)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise WeightsError(
                f"damaged safetensors file: a header of {length} bytes in a file of {size}"
            )
