"""In place of OpenAI's package: `import leanclip.openai as clip`.

The snippets of its README run as they are. Two things differ: the model stays float32 on a GPU,
where OpenAI's becomes float16 (`model.half()` does that), and `jit=True` is refused.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F

from leanclip.config.sections import to_plain
from leanclip.errors import ConfigError
from leanclip.inference import model as inference
from leanclip.model import CLIP
from leanclip.model.skip_init import shapes_alone
from leanclip.preprocess import tokenizer
from leanclip.preprocess.images import Preprocess

__all__ = ["available_models", "load", "tokenize"]


class Model(CLIP):
    """CLIP with the forward pass of OpenAI's."""

    @property
    def dtype(self) -> torch.dtype:
        """The type that images are converted to."""
        return self.text_projection.dtype

    @property
    def vocab_size(self) -> int:
        """The number of token ids."""
        return self.config.vocab_size

    def encode_image(  # pyright: ignore[reportIncompatibleMethodOverride]: their name
        self, image: torch.Tensor
    ) -> torch.Tensor:
        """Prepared images (B, 3, R, R) -> raw image features (B, E)."""
        return super().encode_image(image.to(self.dtype))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]: theirs
        self, image: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits per image (B, T) and per text (T, B): cosines times exp(logit_scale)."""
        image_features = F.normalize(self.encode_image(image), dim=-1)
        text_features = F.normalize(self.encode_text(text), dim=-1)
        logits = self.logit_scale.exp() * image_features @ text_features.T
        return logits, logits.T


def available_models() -> list[str]:
    """The names of the models that OpenAI publishes."""
    return inference.available()


def load(
    name: str | Path,
    device: str | torch.device = "auto",
    jit: bool = False,
    download_root: str | None = None,
) -> tuple[Model, Preprocess]:
    """A model in evaluation mode, and the transform from a PIL image to what it reads.

    Args:
        name: of OpenAI's, which is fetched once, or weights of any dialect.
        device: where the model shall be; by default CUDA where there is a device.
        jit: TorchScript, which is not offered.
        download_root: not used; `LEANCLIP_CACHE` says where fetched files are kept.

    Raises:
        ConfigError: `jit` is set.
        WeightsError: the weights cannot be had.
    """
    if jit:
        raise ConfigError("jit=True: there is no TorchScript here; leave it out")
    clip = inference.load(name, device=device)
    with shapes_alone():
        model = Model(**to_plain(clip.model.config))
    model.load_state_dict(clip.model.state_dict(), assign=True)
    return model.eval(), clip.preprocess


def tokenize(
    texts: str | Sequence[str], context_length: int = 77, truncate: bool = False
) -> torch.Tensor:
    """Token ids of each text, (B, context_length).

    Raises:
        DataError: a text is over the context, and `truncate` is false.
    """
    return tokenizer.tokenize(texts, context_length, truncate=truncate)
