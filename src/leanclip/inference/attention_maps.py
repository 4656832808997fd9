"""Maps of a model's attention: one value per place of an image.

    rollout         which places the features depend on, through all layers of attention
    gradient_map    which places are relevant to a text: attention weighted by its gradients

The places of a ViT are its patches, those of a ResNet the cells of its last stage. A pool of
attention is a last layer with one query.

Shapes: B batch, R resolution, L tokens (P patches, and the class token if there is one), Q queries,
D width, H heads, h = w places per side, E embedding.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from leanclip.model import CLIP, ModifiedResNet
from leanclip.model.pooling import AttentionPool, CrossAttention, QueryPool
from leanclip.model.resnet import AttentionPool2d
from leanclip.model.transformer import Attention, rotate
from leanclip.model.vit import VisionTransformer
from leanclip.preprocess.patches import Patches

Tower = VisionTransformer | ModifiedResNet
Layer = Attention | AttentionPool2d | AttentionPool | QueryPool


@torch.no_grad()
def rollout(model: CLIP, pixels: torch.Tensor | Patches) -> torch.Tensor:
    """Attention rollout (arXiv 2005.00928): (B, 3, R, R) -> (B, h, w), with a sum of 1 per image.

    The sides may differ, in whole patches, of a model with resized positions, which also takes
    `Patches` of one shape.

    The attention of each layer is averaged over its heads and with the identity, for the residual
    connection; the matrices are multiplied, and read at the token or tokens that are pooled. A
    ResNet has one layer of attention, its pool.
    """
    visual, pixels = model.visual, _pixels(pixels)
    layers = _attention_layers(visual)
    with _inputs_of(*layers) as inputs:
        visual(pixels)
    flow = torch.empty(0)
    for layer in layers:
        rotation = _rotation(visual, inputs[layer])
        step = _attend(layer, inputs[layer], rotation)[0].mean(dim=1)  # (B, L, L), or (B, 1, L)
        if isinstance(layer, Attention):
            step = (step + torch.eye(step.shape[-1], device=step.device)) / 2
        flow = step @ flow if flow.numel() else step  # (B, L, L), or (B, 1, L)
    read = _pooling_weights(visual, flow)[:, None, : flow.shape[1]]  # (B, 1, L), or (B, 1, 1)
    return _normalized(_patches(visual, (read @ flow)[:, 0]), pixels)


def gradient_map(model: CLIP, pixels: torch.Tensor | Patches, text: torch.Tensor) -> torch.Tensor:
    """Relevance of the places of images to texts (arXiv 2103.15679): (B, h, w) in [0, 1].

    The relevance of a layer is its attention times the gradient of the cosine with respect to that
    attention, clamped at 0 and averaged over the heads. The layers' relevances, each plus the
    identity, are multiplied and read at the token or tokens that are pooled. As in the authors'
    code for CLIP, the map of each image is shifted and scaled to a minimum of 0 and a maximum of 1.

    Three cases are not in the paper. With average pooling, the rows of all patches are averaged,
    without the identity that each patch starts from. A ResNet has one layer of attention, its pool.
    A learned query is no token, so that its row is that of its relevance alone.

    Args:
        model: in evaluation mode.
        pixels: (B, 3, R, R), normalised; or as `rollout`.
        text: text features, (B, E), or (E,) for all images.
    """
    visual, pixels = model.visual, _pixels(pixels)
    layers = _attention_layers(visual)
    # The gradient of the attention follows from that of its products with the values, which are
    # the inputs of the output projections; so the tower runs unchanged, with fused kernels.
    outputs = [_output_projection(layer) for layer in layers]
    recorded = _inputs_of(*outputs, with_gradient=True)
    with torch.enable_grad(), _inputs_of(*layers) as inputs, recorded as products:
        features = F.normalize(visual(pixels).float(), dim=-1)
        cosine = (features * F.normalize(text.to(features), dim=-1)).sum()
        gradients = torch.autograd.grad(cosine, [products[layer] for layer in outputs])
    with torch.no_grad():
        start = relevance = torch.empty(0)  # (B, L), from the pooled tokens
        for layer, gradient in zip(layers[::-1], gradients[::-1], strict=True):
            # (B, L, L), or (B, 1, L) of a pool
            step = _relevance(layer, inputs[layer], gradient, _rotation(visual, inputs[layer]))
            if isinstance(layer, AttentionPool | QueryPool):
                relevance, start = step[:, 0], torch.zeros_like(step[:, 0])
                continue
            if not relevance.numel():
                start = relevance = _pooling_weights(visual, step)
            relevance = relevance + (relevance[:, None, : step.shape[1]] @ step)[:, 0]
        relevance = _patches(visual, relevance - start)  # (B, P)
        low, high = relevance.amin(dim=1, keepdim=True), relevance.amax(dim=1, keepdim=True)
        relevance = (relevance - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)
        return _as_grid(relevance, pixels)


def _pixels(pixels: torch.Tensor | Patches) -> torch.Tensor:
    return pixels.pixels() if isinstance(pixels, Patches) else pixels


def _attention_layers(visual: Tower) -> list[Layer]:
    if isinstance(visual, ModifiedResNet):
        return [visual.attnpool]
    blocks = [module for module in visual.transformer.modules() if isinstance(module, Attention)]
    return [*blocks, *([visual.attn_pool] if visual.attn_pool is not None else [])]


def _output_projection(layer: Layer) -> nn.Module:
    if isinstance(layer, AttentionPool2d):
        return layer.c_proj
    return layer.attn.out_proj if isinstance(layer, AttentionPool | QueryPool) else layer.out_proj


def _rotation(visual: Tower, x: torch.Tensor) -> torch.Tensor | None:
    return visual.rotation(x) if isinstance(visual, VisionTransformer) else None


def _patches(visual: Tower, values: torch.Tensor) -> torch.Tensor:
    """Values of tokens (B, L) without that of the class token or of a ResNet's mean: (B, P)."""
    has_first = isinstance(visual, ModifiedResNet) or visual.class_embedding is not None
    return values[:, 1:] if has_first else values


def _pooling_weights(visual: Tower, step: torch.Tensor) -> torch.Tensor:
    """The weights of the queries in the features, (B, L), for a last layer's (B, Q, L)."""
    weights = torch.zeros_like(step[:, 0])
    if isinstance(visual, VisionTransformer) and visual.config.vision_pool == "avg":
        patches = _patches(visual, weights)  # a view
        patches[:] = 1 / patches.shape[1]
    else:
        weights[:, 0] = 1
    return weights


def _relevance(
    layer: Layer, x: torch.Tensor, gradient: torch.Tensor, rotation: torch.Tensor | None
) -> torch.Tensor:
    """Attention times its gradient, clamped at 0 and averaged over the heads: (B, Q, L).

    Args:
        layer: a layer of attention.
        x: its input.
        gradient: of the products of attention and values: (B, Q, D), or (B, D) if there is only
            one query.
        rotation: of rotary positions.
    """
    attention, values = _attend(layer, x, rotation)  # (B, H, Q, L), (B, H, L, D/H)
    if gradient.dim() == 2:
        gradient = gradient[:, None]  # (B, 1, D)
    heads = attention.shape[1]
    gradient = gradient.float().unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, Q, D/H)
    to_attention = gradient @ values.mT  # (B, H, Q, L)
    return (attention[:, :, : gradient.shape[2]] * to_attention).clamp(min=0).mean(dim=1)


@contextmanager
def _inputs_of(
    *modules: nn.Module, with_gradient: bool = False
) -> Iterator[dict[nn.Module, torch.Tensor]]:
    """Record the first input of each module in the block."""
    inputs: dict[nn.Module, torch.Tensor] = {}

    def record(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = args[0]
        if with_gradient and not x.requires_grad:  # the parameters before it are locked
            x = x.detach().requires_grad_()
        inputs[module] = x
        return (x, *args[1:])

    hooks = [module.register_forward_pre_hook(record) for module in modules]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def _attend(
    layer: Layer, x: torch.Tensor, rotation: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention (B, H, Q, L) and the values (B, H, L, D/H) of a layer for its input x.

    The input is (B, L, D), or (B, C, h, w) of a ResNet's pool, whose single query is the mean.
    """
    match layer:
        case AttentionPool2d():
            x = x.flatten(2).transpose(1, 2)  # (B, hw, C)
            x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + layer.positional_embedding
            parts = (layer.q_proj(x[:, :1]), layer.k_proj(x), layer.v_proj(x))
        case Attention():
            parts = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, dim=-1)
        case AttentionPool():
            query = layer.probe.to(x.dtype).expand(len(x), -1, -1)
            parts = _project(layer.attn, (query, x, x), layer.attn.in_proj_weight.chunk(3))
        case QueryPool():
            query, x = layer.ln_q(layer.query[:1]).expand(len(x), 1, -1), layer.ln_k(x)
            attn = layer.attn
            weights = (attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight)
            parts = _project(attn, (query, x, x), weights)
    pooled = layer.attn if isinstance(layer, AttentionPool | QueryPool) else layer
    q, k, v = (one.float().unflatten(-1, (pooled.heads, -1)).transpose(1, 2) for one in parts)
    if rotation is not None and isinstance(layer, Attention):
        q, k = rotate(q, rotation), rotate(k, rotation)
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1), v


def _project(
    attention: Attention | CrossAttention,
    inputs: tuple[torch.Tensor, ...],
    weights: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of a pool."""
    biases = attention.in_proj_bias.chunk(3)
    return tuple(F.linear(*three) for three in zip(inputs, weights, biases, strict=True))


def _normalized(values: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """(B, hw) -> (B, h, w) with a sum of 1 per image."""
    return _as_grid(values / values.sum(dim=1, keepdim=True), pixels)


def _as_grid(values: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """(B, hw) -> (B, h, w), in the proportions of the pixels."""
    height, width = pixels.shape[2:]
    rows = round(math.sqrt(values.shape[1] * height / width))
    return values.float().view(len(values), rows, -1)
