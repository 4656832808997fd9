"""One number that says which weights these are, whatever file they came from."""

import hashlib
from collections.abc import Mapping

import torch


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over tensors in the order of their names: name, type, shape, and little-endian bytes.

    Of a model's `state_dict()`, which has OpenAI's names and one type whatever was read, it is
    the same for the same weights in every format.
    """
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
