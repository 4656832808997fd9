"""A drop-in for PASSL and for the parts of Paddle in its document "Train CLIP Model".

    import leanclip.passl as paddle
    from leanclip.passl import CLIPWrapper, SimpleTokenizer, Compose, Resize, CenterCrop, ToTensor

With these lines in place of the document's imports its cells run; docs/checkpoints.md lists all
replacements. Features and images are torch tensors that take Paddle's arguments where the document
uses them.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn, no_grad
from torch.nn import functional as F

import leanclip
from leanclip.errors import ConfigError
from leanclip.model import CLIP
from leanclip.openai import transforms
from leanclip.openai.bpe import SimpleTokenizer
from leanclip.openai.transforms import CenterCrop, Compose, Normalize, Resize
from leanclip.preprocess.decoding import Source, open_image
from leanclip.preprocess.images import center_crop, to_array
from leanclip.weights import Weights, load_into
from leanclip.weights.passl import from_state_dict, paddle_arrays
from leanclip.weights.unpickle import read_numpy_pickle

__all__ = [
    "CLIPWrapper",
    "CenterCrop",
    "Compose",
    "Normalize",
    "Resize",
    "SimpleTokenizer",
    "Tensor",
    "ToRGB",
    "ToTensor",
    "__version__",
    "load",
    "matmul",
    "no_grad",
    "preprocess",
    "to_tensor",
    "zeros",
]
__version__ = leanclip.__version__


class Tensor(torch.Tensor):
    """A torch tensor whose `norm` and `transpose` also take Paddle's arguments."""

    def norm(  # pyright: ignore[reportIncompatibleMethodOverride]: Paddle's argument is added
        self, p: Any = "fro", dim: Any = None, keepdim: bool = False, *, axis: Any = None
    ) -> torch.Tensor:
        """The norm over `axis`, or `dim`; by default over all values."""
        return super().norm(p, dim if axis is None else axis, keepdim)

    def transpose(  # pyright: ignore[reportIncompatibleMethodOverride]: Paddle's form is added
        self, *axes: Any, **torchs: Any
    ) -> torch.Tensor:
        """Permute the axes, `transpose((1, 2, 0))`; or swap two of them, as in torch."""
        if len(axes) == 1 and not torchs:
            return self.permute(*axes[0])
        return super().transpose(*axes, **torchs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tensor":
        """As torch's, whose default refuses subclasses."""
        return copy.deepcopy(self.as_subclass(torch.Tensor), memo).as_subclass(Tensor)


class _Model(CLIP):
    """A CLIP that takes and returns such tensors."""

    def encode_image(self, pixels: Any) -> torch.Tensor:
        return super().encode_image(pixels.as_subclass(torch.Tensor)).as_subclass(Tensor)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().encode_text(tokens.as_subclass(torch.Tensor)).as_subclass(Tensor)


class CLIPWrapper(nn.Module):
    """A CLIP in `.model`, with PASSL's methods for loading and training.

    Args:
        architectual: the `arch` dict, as early versions of PASSL's document spell it.
        head: ignored; the losses are always those of PASSL's head.
        architecture: the `arch` dict.

    Raises:
        ConfigError: there is no `arch` dict, or a setting of it is wrong.
    """

    def __init__(
        self,
        architectual: Mapping[str, Any] | None = None,
        head: Mapping[str, Any] | None = None,
        *,
        architecture: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        arch = architecture or architectual
        if arch is None:
            raise ConfigError("CLIPWrapper: give the architecture: CLIPWrapper(architecture=arch)")
        self.model = _Model(**arch)

    def set_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the parameters of a .pdparams, or those of `state_dict()`.

        Raises:
            WeightsError: they do not fit.
        """
        source, tensors = Path("state_dict"), dict(state_dict)
        if all(isinstance(value, torch.Tensor) for value in tensors.values()):
            tensors = {name.removeprefix("model."): value for name, value in tensors.items()}
            weights = Weights(source, "state dict", tensors, self.model.config)
        else:
            weights = from_state_dict(source, paddle_arrays(tensors, source), self.model.config)
        load_into(self.model, weights)

    def train_iter(self, image: torch.Tensor, text: torch.Tensor) -> dict[str, torch.Tensor]:
        """The losses of a batch: each direction's cross-entropy, and `loss`, their sum.

        PASSL's sum is twice the mean that leanclip trains with.
        """
        features = self.model(image, text)
        logits = features.scale * features.image @ features.text.T  # (B, B)
        matching = torch.arange(len(logits), device=logits.device)
        img_loss = F.cross_entropy(logits, matching)
        text_loss = F.cross_entropy(logits.T, matching)
        return {"loss": img_loss + text_loss, "img_loss": img_loss, "text_loss": text_loss}

    def forward(self, *inputs: torch.Tensor, mode: str = "train") -> dict[str, torch.Tensor]:
        """`train_iter`, the only mode that works in PASSL.

        Raises:
            ConfigError: another mode.
        """
        if mode != "train":
            raise ConfigError(f"CLIPWrapper: mode {mode}: there is only train")
        return self.train_iter(*inputs)


def load(path: str | Path) -> Any:
    """The content of a .pdparams as numpy arrays, as from `paddle.load`; nothing in it is executed.

    Raises:
        WeightsError: it cannot be read, or contains more than data.
    """
    return read_numpy_pickle(path)


def to_tensor(data: Any) -> Tensor:
    """A tensor with a copy of an array, numbers or a tensor."""
    tensor = data.detach().clone() if isinstance(data, torch.Tensor) else torch.tensor(data)
    return tensor.as_subclass(Tensor)


def zeros(shape: Sequence[int], dtype: str = "float32") -> Tensor:
    """A tensor of zeros, its type by name."""
    return torch.zeros(tuple(shape), dtype=getattr(torch, dtype)).as_subclass(Tensor)


def matmul(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The matrix product."""
    return torch.matmul(x, y)


class ToTensor(transforms.ToTensor):
    """A PIL image -> (3, height, width) float32 in [0, 1]."""

    def __call__(self, image: Image.Image | np.ndarray) -> Tensor:
        """The tensor of one image."""
        return super().__call__(image).as_subclass(Tensor)


class ToRGB:
    """A PIL image -> RGB."""

    def __call__(self, image: Image.Image) -> Image.Image:
        """The image, converted."""
        return image.convert("RGB")


def preprocess(image: Source, resolution: int = 224) -> np.ndarray:
    """The document's Resize, CenterCrop and ToTensor: (3, R, R) float32 in [0, 1].

    Raises:
        SampleError: the image cannot be read.
    """
    return to_array(center_crop(open_image(image), resolution)).astype(np.float32) / 255
