"""Retrieval between images and captions: recall@k both ways.

Shapes: N images, M captions, E embedding.
"""

import torch


def recall_at_k(scores: torch.Tensor, owners: torch.Tensor, k: int) -> tuple[float, float]:
    """Image-to-text and text-to-image recall@k of scores (N, M).

    `owners[j]` is the image that caption j belongs to. An image is found when any caption of
    its own is among its k highest; a caption, when its image is among its k highest.
    """
    images, captions = scores.shape
    best = scores.topk(min(k, captions), dim=1).indices  # (N, k)
    image_to_text = (owners[best] == torch.arange(images)[:, None]).any(dim=1)
    best = scores.topk(min(k, images), dim=0).indices  # (k, M)
    text_to_image = (best == owners).any(dim=0)
    return image_to_text.float().mean().item(), text_to_image.float().mean().item()


def retrieval_metrics(scores: torch.Tensor, owners: torch.Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10, both ways, by the names the field logs them under."""
    metrics = {}
    for k in (1, 5, 10):
        image_to_text, text_to_image = recall_at_k(scores, owners, k)
        metrics[f"image_to_text_R@{k}"] = image_to_text
        metrics[f"text_to_image_R@{k}"] = text_to_image
    return metrics
