"""Where a model looked: maps over the places of an image, one value for each.

    rollout         which places reach the features, through every layer of attention
    gradient_map    which places are relevant to a text, by attention and its gradients

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

Layer = Attention | AttentionPool2d


@torch.no_grad()
def rollout(model: CLIP, pixels: torch.Tensor) -> torch.Tensor:
    """Attention rollout (arXiv 2005.00928): (B, 3, R, R) -> (B, h, w), 1 over an image.

    A layer passes on half of what a token was and half of what it attends to, its heads
    averaged; the layers' matrices are multiplied, and read where the features are read. Of a
    ResNet it is the attention of its pool, the only one it has.
    """
    visual = model.visual
    layers = _attention_layers(visual)
    with _inputs_of(*layers) as inputs:
        visual(pixels)
    if isinstance(visual, ModifiedResNet):
        attention, _ = _attend(visual.attnpool, inputs[visual.attnpool])  # (B, H, 1, L)
        return _as_map(attention.mean(dim=1)[:, 0, 1:])
    flow = torch.empty(0)
    for layer in layers:
        attention = _attend(layer, inputs[layer])[0].mean(dim=1)  # (B, L, L)
        eye = torch.eye(attention.shape[-1], device=attention.device)
        step = (attention + eye) / 2
        flow = step @ flow if flow.numel() else step  # (B, L, L)
    read = flow[:, 0] if visual.pool == "tok" else flow[:, 1:].mean(dim=1)  # (B, L)
    return _as_map(read[:, 1:])


def gradient_map(model: CLIP, pixels: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Relevance of the places of images for texts (arXiv 2103.15679): (B, h, w) in [0, 1].

    A layer's relevance is its attention times the gradient of the cosine with respect to that
    attention, what is below zero set to zero, averaged over the heads. The layers' relevances, each
    plus the identity, are multiplied and read where the features are read. As in the authors' code
    for CLIP, an image's map is shifted and scaled so that its lowest value is 0 and its highest 1.

    Two cases are not in the paper. With average pooling, the rows of all patches are averaged,
    less the identity that each patch starts from. A ResNet has one layer of attention, its pool.

    Args:
        model: in evaluation mode.
        pixels: (B, 3, R, R), normalised.
        text: (B, E) or (E,), the features of each image's text, or of one text for all.
    """
    visual = model.visual
    layers = _attention_layers(visual)
    # Gradients with respect to attention follow from those of its products with the values, which
    # the output projections are given; so the tower runs as it is, by fused kernels.
    outputs = [x.c_proj if isinstance(x, AttentionPool2d) else x.out_proj for x in layers]
    recorded = _inputs_of(*outputs, with_gradient=True)
    with torch.enable_grad(), _inputs_of(*layers) as inputs, recorded as products:
        features = F.normalize(visual(pixels).float(), dim=-1)
        cosine = (features * F.normalize(text.to(features), dim=-1)).sum()
        gradients = torch.autograd.grad(cosine, [products[layer] for layer in outputs])
    with torch.no_grad():
        start = relevance = torch.empty(0)  # (B, L) of the tokens where the features are read
        for layer, gradient in zip(layers[::-1], gradients[::-1], strict=True):
            step = _relevance(layer, inputs[layer], gradient)  # (B, L, L), or (B, 1, L) of a pool
            if not relevance.numel():
                start = relevance = _read_at(visual, step)
            relevance = relevance + (relevance[:, None, : step.shape[1]] @ step)[:, 0]
        relevance = (relevance - start)[:, 1:]  # (B, P)
        low, high = relevance.amin(dim=1, keepdim=True), relevance.amax(dim=1, keepdim=True)
        scaled = (relevance - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    return _as_map(scaled, is_share=False)


def _attention_layers(visual: VisionTransformer | ModifiedResNet) -> list[Layer]:
    if isinstance(visual, ModifiedResNet):
        return [visual.attnpool]
    return [module for module in visual.transformer.modules() if isinstance(module, Attention)]


def _read_at(visual: VisionTransformer | ModifiedResNet, step: torch.Tensor) -> torch.Tensor:
    """How much of each token the features are, (B, L), for a last layer's (B, 1 or L, L)."""
    weights = torch.zeros_like(step[:, 0])
    if isinstance(visual, VisionTransformer) and visual.pool == "avg":
        weights[:, 1:] = 1 / (weights.shape[1] - 1)
    else:
        weights[:, 0] = 1
    return weights


def _relevance(layer: Layer, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The positive part of attention times its gradient, averaged over the heads: (B, Q, L).

    Args:
        layer: the layer.
        x: its input.
        gradient: (B, Q, D), or (B, D) of the first token's query alone, with respect to the
            products of attention and values.
    """
    attention, values = _attend(layer, x)  # (B, H, Q, L), (B, H, L, D/H)
    if gradient.dim() == 2:
        gradient = gradient[:, None]  # (B, 1, D)
    gradient = gradient.float().unflatten(-1, (layer.heads, -1)).transpose(1, 2)  # (B, H, Q, D/H)
    to_attention = gradient @ values.mT  # (B, H, Q, L)
    return (attention[:, :, : gradient.shape[2]] * to_attention).clamp(min=0).mean(dim=1)


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


def _attend(layer: Layer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's attention (B, H, L, L) and values (B, H, L, D/H) for its input x.

    A ViT's layers are given (B, L, D), a ResNet's pool (B, C, h, w); its one query is their mean.
    """
    if isinstance(layer, AttentionPool2d):
        x = x.flatten(2).transpose(1, 2)  # (B, hw, C)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + layer.positional_embedding
        parts = (layer.q_proj(x[:, :1]), layer.k_proj(x), layer.v_proj(x))
    else:
        parts = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (one.float().unflatten(-1, (layer.heads, -1)).transpose(1, 2) for one in parts)
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1), v


def _as_map(values: torch.Tensor, *, is_share: bool = True) -> torch.Tensor:
    """(B, hw) -> (B, h, w), as shares of an image where they are that."""
    side = math.isqrt(values.shape[1])
    if is_share:
        values = values / values.sum(dim=1, keepdim=True)
    return values.float().view(-1, side, side)
