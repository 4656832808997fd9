"""Where a model looked: maps over the places of an image, one value for each.

    rollout         which places reach the features, through every layer of attention
    gradient_map    which places speak for a text, by the gradient of their cosine

A ViT's places are its patches, a ResNet's those of its last stage.

Shapes: B batch, R resolution, L tokens (P patches and the class token), D width, H heads,
h = w places along a side, E embedding.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from leanclip.model import CLIP, ModifiedResNet
from leanclip.model.resnet import AttentionPool2d
from leanclip.model.transformer import Attention
from leanclip.model.vit import VisionTransformer


@torch.no_grad()
def rollout(model: CLIP, pixels: torch.Tensor) -> torch.Tensor:
    """Attention rollout (arXiv 2005.00928): (B, 3, R, R) -> (B, h, w), 1 over an image.

    A layer passes on half of what a token was and half of what it attends to, its heads
    averaged; the layers' matrices are multiplied, and read where the features are read. Of a
    ResNet it is the attention of its pool, the only one it has.
    """
    visual = model.visual
    if isinstance(visual, ModifiedResNet):
        with _inputs_of(visual.attnpool) as seen:
            visual(pixels)
        attention = _pool_attention(visual.attnpool, seen[visual.attnpool])  # (B, hw+1)
        return _as_map(attention[:, 1:])
    layers = [module for module in visual.transformer.modules() if isinstance(module, Attention)]
    with _inputs_of(*layers) as seen:
        visual(pixels)
    flow = torch.empty(0)
    for layer in layers:
        attention = _attention(layer, seen[layer])  # (B, L, L)
        eye = torch.eye(attention.shape[-1], device=attention.device)
        step = (attention + eye) / 2
        flow = step @ flow if flow.numel() else step  # (B, L, L)
    read = flow[:, 0] if visual.pool == "tok" else flow[:, 1:].mean(dim=1)  # (B, L)
    return _as_map(read[:, 1:])


def gradient_map(model: CLIP, pixels: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Grad-CAM (arXiv 1610.02391) of the cosine between images and texts: (B, h, w), at least 0.

    The channels of the last layer that still has places (a ResNet's last stage, what a ViT's
    last block is given) are weighted by the mean of their gradients, summed, and what is below
    zero is cut.

    Args:
        model: in evaluation mode.
        pixels: (B, 3, R, R), normalised.
        text: (B, E) or (E,), the features of the text that each image is asked for.
    """
    visual = model.visual
    layer = visual.attnpool if isinstance(visual, ModifiedResNet) else _last_block(visual)
    with torch.enable_grad(), _inputs_of(layer, with_gradient=True) as seen:
        features = F.normalize(visual(pixels).float(), dim=-1)
        cosine = (features * F.normalize(text.to(features), dim=-1)).sum()
        (gradient,) = torch.autograd.grad(cosine, seen[layer])
    x = seen[layer].detach()
    if isinstance(visual, ModifiedResNet):  # (B, C, h, w) -> (B, hw, C)
        x, gradient = (value.flatten(2).transpose(1, 2) for value in (x, gradient))
    else:
        x, gradient = x[:, 1:], gradient[:, 1:]  # (B, P, D)
    weights = gradient.mean(dim=1, keepdim=True)  # (B, 1, D)
    return _as_map((weights * x).sum(dim=-1).clamp(min=0), is_share=False)


def _last_block(visual: VisionTransformer) -> nn.Module:
    return visual.transformer.resblocks[-1]


@contextmanager
def _inputs_of(
    *modules: nn.Module, with_gradient: bool = False
) -> Iterator[dict[nn.Module, torch.Tensor]]:
    """What each module is called with, while it is."""
    seen: dict[nn.Module, torch.Tensor] = {}

    def note(module: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        x = given[0]
        if with_gradient and not x.requires_grad:  # all before it is locked
            x = x.detach().requires_grad_()
        seen[module] = x
        return (x, *given[1:])

    hooks = [module.register_forward_pre_hook(note) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _attention(layer: Attention, x: torch.Tensor) -> torch.Tensor:
    """The weights (B, L, L) of a layer that is given x (B, L, D), its heads averaged."""
    qkv = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).float()  # (B, L, 3D)
    q, k, _ = qkv.unflatten(-1, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, L, D/H)
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1).mean(dim=1)


def _pool_attention(pool: AttentionPool2d, x: torch.Tensor) -> torch.Tensor:
    """The weights (B, hw+1) that a ResNet's pool has for x (B, C, h, w), its heads averaged."""
    x = x.flatten(2).transpose(1, 2)  # (B, hw, C)
    x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + pool.positional_embedding
    q = pool.q_proj(x[:, :1]).float().unflatten(-1, (pool.heads, -1)).transpose(1, 2)
    k = pool.k_proj(x).float().unflatten(-1, (pool.heads, -1)).transpose(1, 2)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, H, 1, hw+1)
    return scores.softmax(dim=-1).mean(dim=1)[:, 0]


def _as_map(values: torch.Tensor, *, is_share: bool = True) -> torch.Tensor:
    """(B, hw) -> (B, h, w), as shares of an image where they are that."""
    side = math.isqrt(values.shape[1])
    if is_share:
        values = values / values.sum(dim=1, keepdim=True)
    return values.float().view(-1, side, side)
