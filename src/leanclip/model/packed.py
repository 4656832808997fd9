"""Texts through a causal text tower without padding, their common prefix computed once.

    "a photo of a cat", "a photo of two dogs" -> a photo of | a cat | two dogs -> features

In a causal tower the tokens of "a photo of" do not attend to what follows: their activations are
the same in every text. The other tokens of all texts are concatenated, so that linear layers
compute no padding; only attention pads them.

Shapes: B texts, L tokens of the longest, P of them in the common prefix, S = L - P, T packed
tokens (the prefix, then those of all texts), D width, H heads.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F


class Packed(NamedTuple):
    """The positions of packed tokens (T) and padded ones (B, S)."""

    prefix: int  # P
    is_token: torch.Tensor  # (B, S) bool, false for padding
    indices: torch.Tensor  # (B, S), of each token among the T; arbitrary for padding
    end: torch.Tensor  # (B,), indices of the end tokens among the T
    mask: torch.Tensor  # (S, P + S) bool, the keys that a query attends to

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, D) -> (T, D)."""
        return torch.cat([x[0, : self.prefix], x[:, self.prefix :][self.is_token]])

    def attend(self, qkv: torch.Tensor, heads: int) -> torch.Tensor:
        """Causal attention: queries, keys and values (T, 3D) -> (T, D)."""
        first_q, first_k, first_v = split_heads(qkv[None, : self.prefix], 3, heads)  # (1, H, P, _)
        q, k, v = split_heads(qkv[self.indices], 3, heads)  # each (B, H, S, D/H)
        first = F.scaled_dot_product_attention(first_q, first_k, first_v, is_causal=True)[0]
        keys, values = _after_prefix(first_k, k), _after_prefix(first_v, v)  # (B, H, P + S, D/H)
        rest = F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask)
        rest = rest.transpose(1, 2).flatten(2)[self.is_token]  # (T - P, D)
        return torch.cat([first.transpose(0, 1).flatten(1), rest])

    def attend_at_end(self, q: torch.Tensor, kv: torch.Tensor, heads: int) -> torch.Tensor:
        """Attention of the end tokens: queries (B, 1, D), keys and values (T, 2D) -> (B, D)."""
        (q,) = split_heads(q, 1, heads)  # (B, H, 1, D/H)
        first_k, first_v = split_heads(kv[None, : self.prefix], 2, heads)  # (1, H, P, D/H)
        k, v = split_heads(kv[self.indices], 2, heads)  # (B, H, S, D/H)
        mask = F.pad(self.is_token, (self.prefix, 0), value=True)[:, None, None]  # (B, 1, 1, P+S)
        x = F.scaled_dot_product_attention(
            q, _after_prefix(first_k, k), _after_prefix(first_v, v), attn_mask=mask
        )
        return x.flatten(1)


def packed_layout(tokens: torch.Tensor, end: torch.Tensor) -> Packed:
    """The layout of token ids (B, L), B > 0, of which those up to `end` (B,) are computed."""
    lengths = end + 1  # (B,)
    same = (tokens == tokens[:1]).all(dim=0)  # (L,)
    prefix = min(int(same.cumprod(dim=0).sum()), int(lengths.min()) - 1)
    positions = torch.arange(int(lengths.max()), device=tokens.device)  # (L,)
    is_token = positions[prefix:] < lengths[:, None]  # (B, S)
    indices = is_token.flatten().cumsum(dim=0).view_as(is_token) - 1 + prefix
    end = indices.gather(1, lengths[:, None] - 1 - prefix)[:, 0]
    return Packed(prefix, is_token, indices, end, positions <= positions[prefix:, None])


def split_heads(x: torch.Tensor, parts: int, heads: int) -> tuple[torch.Tensor, ...]:
    """(B, L, parts * D) -> `parts` of (B, H, L, D/H)."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _after_prefix(first: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """(1, H, P, D/H) before each of (B, H, S, D/H)."""
    return torch.cat([first.expand(len(rest), -1, -1, -1), rest], dim=2)
