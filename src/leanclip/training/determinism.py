"""Numerics of a GPU's kernels: deterministic algorithms (`train.deterministic`), TF32 (`tf32`)."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from leanclip.errors import ConfigError


def allow_tf32(is_allowed: bool) -> None:
    """Allow TF32 (10 bits of mantissa) in float32 products and convolutions on a GPU, or not.

    For the whole process. PyTorch's default allows it in convolutions only. Both of its interfaces
    are set, because the newer one wins if a program has used it.
    """
    torch.backends.cuda.matmul.allow_tf32 = is_allowed
    torch.backends.cudnn.allow_tf32 = is_allowed
    precision = "tf32" if is_allowed else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.rnn.fp32_precision = precision  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def only_deterministic(is_wanted: bool) -> Iterator[None]:
    """Allow only deterministic operations, if `is_wanted`.

    Raises:
        ConfigError: an operation has no deterministic implementation on its device.
    """
    if is_wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(is_wanted)
    try:
        yield
    except RuntimeError as error:
        named = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if named is None:
            raise
        raise ConfigError(
            f"train.deterministic: PyTorch's {named[1]} has no deterministic implementation; set "
            "it to false, or change the setting that needs this operation"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before)
