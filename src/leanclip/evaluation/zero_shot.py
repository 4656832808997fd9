"""Zero-shot classification: a classifier made of class names, and its predictions.

Shapes: N images, C classes, T templates, E embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from leanclip.data.dataset import fill
from leanclip.evaluation.classification import Classification, classify
from leanclip.evaluation.features import Encoded, encode_texts
from leanclip.model import CLIP

_BLOCK = 1 << 22  # scores at a time


@dataclass(frozen=True)
class ZeroShotResult(Classification):
    """The predictions of a zero-shot classifier."""

    templates: Sequence[str]
    classifier: torch.Tensor  # (C, E), of unit length
    scale: float
    bias: float | None  # probabilities are sigmoid(scale * cosine + bias); None: softmax


def build_classifier(
    model: CLIP,
    classes: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int = 256,
    shared: bool = False,
    truncate: bool = True,
    packed: bool = False,
) -> torch.Tensor:
    """One unit vector per class, (C, E): the mean over templates of unit text features.

    As in OpenAI's Prompt_Engineering_for_ImageNet notebook: normalise, average, normalise.
    For `shared`, `truncate` and `packed` see `encode_texts`.

    Raises:
        DataError: a prompt is longer than the context, and `truncate` is false.
    """
    prompts = [prompt for name in classes for prompt in fill(templates, name)]
    features = encode_texts(
        model,
        prompts,
        batch_size=batch_size,
        shared=shared,
        truncate=truncate,
        packed=packed,
    )  # (C * T, E)
    return F.normalize(features.view(len(classes), len(templates), -1).mean(dim=1), dim=-1)


def zero_shot(
    images: Encoded,
    classifier: torch.Tensor,
    *,
    classes: Sequence[str],
    templates: Sequence[str],
    scale: float,
    bias: float | None = None,
    device: torch.device | str = "cpu",
) -> ZeroShotResult:
    """Classify encoded images; `scale` is exp(logit_scale), `bias` the logit bias of sigmoids."""
    weights = classifier.to(device)
    rows = max(1, _BLOCK // len(classes))
    scores = (part.to(device) @ weights.T * scale for part in images.features.split(rows))
    result = classify(
        scores,
        images.labels,
        classes=classes,
        indices=images.indices,
        features=images.features,
        logit_bias=bias,
    )
    return ZeroShotResult(
        **vars(result), templates=templates, classifier=classifier, scale=scale, bias=bias
    )
