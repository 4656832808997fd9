"""What a GPU's kernels may do: other bits each time (`train.deterministic`), TF32 (`tf32`)."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from leanclip.errors import ConfigError


def allow_tf32(is_allowed: bool) -> None:
    """Let float32 products and convolutions on a GPU round their factors to TF32's 10 bits, or not.

    Of the whole process, until it is set again. PyTorch's own default is to allow it in
    convolutions only. Both of its interfaces are set, as the newer one wins where a program has
    used it.
    """
    torch.backends.cuda.matmul.allow_tf32 = is_allowed
    torch.backends.cudnn.allow_tf32 = is_allowed
    precision = "tf32" if is_allowed else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.rnn.fp32_precision = precision  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def only_deterministic(is_wanted: bool) -> Iterator[None]:
    """Let only operations run that give the same bits again, if that `is_wanted`; else all.

    Raises:
        ConfigError: an operation ran that has no such form on its device.
    """
    if is_wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it for this
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(is_wanted)
    try:
        yield
    except RuntimeError as error:
        named = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if named is None:
            raise
        raise ConfigError(
            f"train.deterministic: PyTorch's {named[1]} has no form that gives the same bits "
            "again; set it to false, or change the setting that asks for this operation"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before)
