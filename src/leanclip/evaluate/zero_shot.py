"""Zero-shot classification: a classifier made of class names, and its figures.

Shapes: N images, C classes, T templates, E embedding.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from leanclip.data.samples import fill
from leanclip.evaluate.features import encode_texts
from leanclip.model import CLIP


def build_classifier(
    model: CLIP,
    classes: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int = 256,
    truncate: bool = True,
) -> torch.Tensor:
    """One unit vector per class, (C, E): the mean over templates of unit text features.

    As in OpenAI's Prompt_Engineering_for_ImageNet notebook: normalise, average, normalise.

    Raises:
        DataError: a prompt is over the context, and `truncate` does not have it cut.
    """
    prompts = [prompt for name in classes for prompt in fill(templates, name)]
    features = encode_texts(model, prompts, batch_size=batch_size, truncate=truncate)  # (C * T, E)
    return F.normalize(features.view(len(classes), len(templates), -1).mean(dim=1), dim=-1)


def zero_shot_metrics(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Shares of images whose class is first, and among the first five, by scores (N, C)."""
    ranked = scores.topk(min(5, scores.shape[1]), dim=1).indices  # (N, <=5)
    hits = ranked == labels[:, None]
    return {
        "zeroshot_top1": hits[:, 0].float().mean().item(),
        "zeroshot_top5": hits.any(dim=1).float().mean().item(),
    }
