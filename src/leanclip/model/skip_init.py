"""A model made without drawing its values: zeros stand where others will take their place.

Drawing takes most of the time of making a large one; and on the meta device, where there are no
values, PyTorch would import its compiler for it, which takes longer than all else.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import init
from torch.overrides import TorchFunctionMode

# A function of nn.init is either overridden as a whole or reached by the method that it calls.
_DRAWING = frozenset(
    {
        torch.Tensor.normal_,
        torch.Tensor.uniform_,
        init.normal_,
        init.uniform_,
        init.kaiming_uniform_,
    }
)


class SkipInit(TorchFunctionMode):
    """Within it, what a model draws its values with gives zeros."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWING:
            tensor = args[0] if args else kwargs["tensor"]
            return tensor if tensor.is_meta else tensor.detach().zero_()
        return func(*args, **kwargs)


@contextmanager
def meta_device() -> Iterator[None]:
    """Within it, a model has shapes and types, and no values: it is on the meta device."""
    with torch.device("meta"), SkipInit():
        yield
