"""Build a model without random initialisation, for weights that are loaded afterwards.

Random numbers take most of the time of building a large model; on the meta device, which has no
values, PyTorch would import its compiler for them, which takes longer still.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import init
from torch.overrides import TorchFunctionMode

# Functions of nn.init are overridden themselves, or through the method that they call.
_RANDOM = frozenset(
    {
        torch.Tensor.normal_,
        torch.Tensor.uniform_,
        init.normal_,
        init.uniform_,
        init.kaiming_uniform_,
    }
)


class SkipInit(TorchFunctionMode):
    """A mode in which random initialisation writes zeros."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _RANDOM:
            tensor = args[0] if args else kwargs["tensor"]
            return tensor if tensor.is_meta else tensor.detach().zero_()
        return func(*args, **kwargs)


@contextmanager
def meta_device() -> Iterator[None]:
    """Models built within have shapes and types, but no values."""
    with torch.device("meta"), SkipInit():
        yield
