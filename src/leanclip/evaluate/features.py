"""Unit features of images and texts, in batches, without gradients.

Shapes: N images, M texts, E embedding.
"""

from collections.abc import Iterable, Sequence

import torch
from torch.nn import functional as F

from leanclip.data.loader import Batch, trim
from leanclip.images import Preprocess, normalize
from leanclip.model import CLIP
from leanclip.tokenizer import tokenize


@torch.inference_mode()
def encode_images(model: CLIP, batch: Batch, preprocess: Preprocess) -> torch.Tensor:
    """Unit features of one batch's images, (B, E) float32 on the CPU."""
    device = model.logit_scale.device
    pixels = normalize(batch.images.to(device), preprocess.mean, preprocess.std)
    return F.normalize(model.encode_image(pixels).float(), dim=-1).cpu()


@torch.inference_mode()
def encode_texts(
    model: CLIP, texts: Sequence[str], *, batch_size: int = 256, truncate: bool = True
) -> torch.Tensor:
    """Unit features of texts, (M, E) float32 on the CPU; each distinct text is encoded once.

    Raises:
        DataError: a text is over the context, and `truncate` does not have it cut.
    """
    device = model.logit_scale.device
    distinct = list(dict.fromkeys(texts))
    place = {text: i for i, text in enumerate(distinct)}
    parts = []
    for chunk in _chunks(distinct, batch_size):
        tokens = trim(tokenize(chunk, model.context_length, truncate=truncate)).to(device)
        parts.append(F.normalize(model.encode_text(tokens).float(), dim=-1).cpu())
    return torch.cat(parts)[torch.tensor([place[text] for text in texts])]


def _chunks(texts: Sequence[str], size: int) -> Iterable[Sequence[str]]:
    return (texts[first : first + size] for first in range(0, len(texts), size))
