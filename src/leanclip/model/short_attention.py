"""Attention among few tokens, in training on a CPU: three batched products each way.

PyTorch's fused kernel saves the memory of the probabilities, which are few here, and its backward
pass takes longer than the products do: forward and backward of 32 x 50 tokens of ViT-B/32 take
16-17 ms on two cores and not 22-25, of 64 x 26 of the quickstart's model 3-4 and not 5-6.

Shapes: B batch, L tokens, D width, H heads, d = D/H.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

MOST = 64  # tokens; of 197 the kernel is as fast
LEAST = 1 << 16  # values of queries, keys and values; of fewer the kernel is as fast, or faster


def is_faster(qkv: torch.Tensor) -> bool:
    """Whether this is the faster way for (B, L, 3D): not under autocast, nor compiled."""
    is_float_on_cpu = qkv.device.type == "cpu" and qkv.dtype == torch.float32
    fits = qkv.shape[1] <= MOST and qkv.numel() >= LEAST
    return is_float_on_cpu and fits and not torch.compiler.is_compiling()


def attend(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """softmax(q k' / sqrt(d)) v for queries, keys and values side by side: (B, L, 3D) -> (B, L, D).

    Every token sees every other. The same as `scaled_dot_product_attention`, within rounding; its
    gradient has none of its own.
    """
    attended = _Products.apply(qkv, heads)
    assert isinstance(attended, torch.Tensor)
    return attended


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, heads: int) -> torch.Tensor:
        batch, length, width = qkv.shape
        ctx.shape = batch, length, 3, heads, width // 3 // heads
        parts = qkv.reshape(ctx.shape).permute(2, 0, 3, 1, 4).flatten(1, 2).contiguous()
        q, k, v = parts  # each (B * H, L, d)
        scores = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=q.shape[-1] ** -0.5)
        seen = scores.softmax(dim=-1)  # (B * H, L, L)
        ctx.save_for_backward(parts, seen)
        return (seen @ v).unflatten(0, (batch, heads)).transpose(1, 2).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]: hidden by the decorator
        ctx: Any, upstream: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        parts, seen = ctx.saved_tensors
        batch, length, three, heads, size = ctx.shape
        q, k, v = parts
        upstream = upstream.reshape(batch, length, heads, size).transpose(1, 2).flatten(0, 1)
        to_parts = torch.empty_like(parts)
        torch.bmm(seen.mT, upstream, out=to_parts[2])
        to_scores = upstream @ v.mT
        to_scores.sub_((to_scores * seen).sum(dim=-1, keepdim=True)).mul_(seen).mul_(size**-0.5)
        torch.bmm(to_scores, k, out=to_parts[0])
        torch.bmm(to_scores.mT, q, out=to_parts[1])
        to_parts = to_parts.view(three, batch, heads, length, size).permute(1, 3, 0, 2, 4)
        return to_parts.reshape(batch, length, -1), None
