"""Contrastive losses as functions of features.

Shapes: B batch, E embedding.
"""

import torch
from torch.nn import functional as F


def clip_loss(zimg: torch.Tensor, ztxt: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE (arXiv 2103.00020, figure 3) of unit features (B, E), in float32.

    The mean of the image-to-text and the text-to-image cross-entropy. PASSL adds the two, so
    its loss and its gradients are twice these.
    """
    logits = scale * zimg.float() @ ztxt.float().T  # (B, B)
    matching = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, matching) + F.cross_entropy(logits.T, matching)) / 2
