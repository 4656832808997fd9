"""Use a model: load weights of any origin, and turn images and texts into features."""

from dataclasses import dataclass
from pathlib import Path

import torch

from leanclip.distributed import choose_device
from leanclip.errors import WeightsError
from leanclip.images import Preprocess
from leanclip.model import CLIP
from leanclip.settings import to_plain
from leanclip.tokenizer import tokenize
from leanclip.weights import load_into, read_weights
from leanclip.weights.read import Architecture
from leanclip.weights.weights import check_shapes


@dataclass(frozen=True)
class Clip:
    """A model with what belongs to it: how its images are prepared and its texts tokenised."""

    model: CLIP
    preprocess: Preprocess  # an image -> (3, R, R) float32

    def tokenize(self, texts: str | list[str], *, truncate: bool = False) -> torch.Tensor:
        """Token ids (B, L) of texts, L the model's context."""
        return tokenize(texts, self.model.context_length, truncate=truncate)


def load(
    source: str | Path,
    *,
    arch: Architecture | None = None,
    device: str = "auto",
    partial: bool = False,
) -> Clip:
    """Load weights of any dialect, in evaluation mode and float32.

    Args:
        source: a file, a folder, a run's folder, a published name or a hub id.
        arch: the architecture, where the source does not say it or says it wrongly.
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
        partial: keep a new model's values for missing keys; drop left-over ones.

    Raises:
        WeightsError: the weights cannot be read, do not fit, or do not say their architecture.
        ConfigError: `arch` or `device` is none.
    """
    weights = read_weights(source, arch=arch)
    if weights.model is None:
        raise WeightsError(
            f"{weights.source}: a {weights.dialect} without its architecture (the tensors do not "
            f"tell the activation); say it with arch=, for example arch='ViT-B-32' (exact GELU) "
            f"or arch='ViT-B-32-quickgelu' (OpenAI's)"
        )
    check_shapes(weights, weights.model)
    model = CLIP(**to_plain(weights.model)).to(choose_device(device))
    load_into(model, weights, partial=partial)
    preprocess = weights.preprocess or Preprocess(weights.model.image_resolution)
    return Clip(model.eval(), preprocess)
