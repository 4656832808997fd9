"""In place of PASSL: `CLIPWrapper` and `SimpleTokenizer`, as its "Train CLIP Model" uses them.

With `paddle` replaced by `torch` its cells run; `paddle.load` is `load` here, for torch.load does
not read .pdparams, and the Compose of paddle.vision is `preprocess`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from leanclip.errors import ConfigError
from leanclip.model import CLIP
from leanclip.preprocess import tokenizer
from leanclip.preprocess.images import Source, center_crop, open_image, to_array
from leanclip.weights import Weights, load_into
from leanclip.weights.numpy_pickle import read_numpy_pickle
from leanclip.weights.paddle import paddle_arrays
from leanclip.weights.passl import from_arrays

__all__ = ["CLIPWrapper", "SimpleTokenizer", "load", "preprocess"]


class CLIPWrapper(nn.Module):
    """A CLIP in `.model`, with PASSL's ways of loading and training it.

    Args:
        architectual: the `arch` dict; PASSL's document spells it so.
        head: `{"name": ...}`; whatever it says, the losses are those of PASSL's head.
        architecture: the `arch` dict, as the later PASSL has it.

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
        self.model = CLIP(**arch)

    def set_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the parameters of a .pdparams, or those of `state_dict()`.

        Raises:
            WeightsError: they do not fit.
        """
        source, tensors = Path("state_dict"), dict(state_dict)
        if all(isinstance(value, torch.Tensor) for value in tensors.values()):
            tensors = {name.removeprefix("model."): value for name, value in tensors.items()}
            weights = Weights(source, "state dict", tensors, self.model.config)
        else:
            weights = from_arrays(source, paddle_arrays(tensors, source), self.model.config)
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


class SimpleTokenizer:
    """The tokeniser's tables, and its ids without start and end tokens."""

    def __init__(self, bpe_path: str | None = None) -> None:  # leanclip has the file in itself
        self.encoder = tokenizer.vocabulary()  # symbol -> id
        self.decoder = {number: symbol for symbol, number in self.encoder.items()}

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return tokenizer.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ids, with a space after each word, start and end tokens as they are."""
        table = tokenizer.byte_of_character()
        symbols = "".join(self.decoder[int(token)] for token in tokens)
        text = bytes(table[character] for character in symbols).decode("utf-8", errors="replace")
        return text.replace("</w>", " ")


def load(path: str | Path) -> Any:
    """What a .pdparams holds, as `paddle.load` gives it, with numpy arrays; nothing in it is run.

    Raises:
        WeightsError: it cannot be read, or holds more than data.
    """
    return read_numpy_pickle(path)


def preprocess(image: Source, resolution: int = 224) -> np.ndarray:
    """The document's Resize, CenterCrop and ToTensor: (3, R, R) float32 in [0, 1].

    Raises:
        SampleError: the image cannot be read.
    """
    return to_array(center_crop(open_image(image), resolution)).astype(np.float32) / 255
