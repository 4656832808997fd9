"""The tensors in a file of PyTorch's, out of whatever a training program wrapped them in."""

import json
from pathlib import Path
from typing import Any

import torch

from leanclip.errors import WeightsError
from leanclip.io.files import LFS_POINTER, is_lfs_file
from leanclip.weights.archive import Module, module_tensors, read_torch_legacy, read_torch_zip
from leanclip.weights.formats import sniff
from leanclip.weights.numpy_pickle import check_sharing
from leanclip.weights.unpickle import refusing

TORCHSCRIPT = ("TorchScript code, which was not read",)
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "state_dict_ema", "model_ema")
_PREFIXES = ("module.", "_orig_mod.", "model.", "clip.")


def read_torch(
    path: Path, kind: str | None = None
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """The tensors of a torch.save file or TorchScript archive, and what else it holds.

    `kind` is what `sniff` said of it, where that is known.

    Raises:
        WeightsError: the file is damaged, holds more than data, or no state dict.
    """
    is_zip = (kind or sniff(path)) == "zip"
    loaded = read_torch_zip(path) if is_zip else read_torch_legacy(path)
    others: tuple[str, ...] = TORCHSCRIPT
    if isinstance(loaded, Module):
        tensors = module_tensors(loaded)
    else:
        tensors, others = unwrap(loaded, path)
    with refusing(path, "file of PyTorch's"):
        check_sharing((tensor.data_ptr(), tensor.nbytes) for tensor in tensors.values())
    return tensors, others


def unwrap(loaded: object, source: Path) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """The state dict in a checkpoint, without the prefixes of wrappers around the model."""
    others: list[str] = []
    for _ in range(4):  # a wrapper in a wrapper, and no endless one
        if not isinstance(loaded, dict) or _is_state_dict(loaded):
            break
        name = next((name for name in _WRAPPERS if isinstance(loaded.get(name), dict)), None)
        if name is None:
            raise WeightsError(
                f"{source}: holds no state dict; its keys are {', '.join(map(str, loaded))[:100]}"
            )
        others += [str(key) for key in loaded if key != name]
        loaded = loaded[name]
    if not isinstance(loaded, dict) or not _is_state_dict(loaded):
        raise WeightsError(f"{source}: holds a {type(loaded).__name__}, not a state dict")
    tensors: dict[str, torch.Tensor] = dict(loaded)
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors, tuple(others)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        WeightsError: it is missing or no object.
    """
    if is_lfs_file(path):
        raise WeightsError(f"{path}: {LFS_POINTER}")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: cannot be read: {error}") from None
    if not isinstance(facts, dict):
        raise WeightsError(f"{path}: holds no JSON object")
    return facts


def _is_state_dict(loaded: dict) -> bool:
    return bool(loaded) and all(isinstance(value, torch.Tensor) for value in loaded.values())
