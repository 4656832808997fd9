"""Many texts through a causal text tower without padding, their common beginning only once.

    "a photo of a cat", "a photo of two dogs" -> a photo of | a cat | two dogs -> features

In a causal tower the tokens of "a photo of" do not see what follows: what they become is the same
in every text, and is computed for one. The other tokens stand one after the other, so that every
product is of tokens alone; only attention looks at texts side by side.

Shapes: B texts, L tokens of the longest, P of them in the common prefix, S = L - P, T = P and the
tokens of all texts behind it, D width, H heads, E embedding.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from leanclip.model.clip import CLIP
from leanclip.model.transformer import Attention, Block


def encode_packed(model: CLIP, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Raw text features (B, E): those of `model.encode_text` within rounding.

    Of a tower that is not causal, or not read at the end token, they are `model.encode_text`'s.

    Args:
        model: on one device, not in shards.
        tokens: ids (B, L).
        lengths: (B,) int64, tokens of each text, its end token the last.
    """
    config = model.config
    if not (config.transformer_causal and config.transformer_pool == "argmax" and len(tokens)):
        return model.encode_text(tokens)
    layout = _lay_out(tokens, lengths)
    x = model.token_embedding(tokens) + model.positional_embedding[: tokens.shape[1]]  # (B, L, D)
    x = torch.cat([x[0, : layout.prefix], x[:, layout.prefix :][layout.is_token]])  # (T, D)
    *blocks, last = model.transformer.resblocks
    for block in blocks:
        assert isinstance(block, Block)
        x = _after(block, x, _attend(block.attn, block.ln_1(x), layout))  # (T, D)
    assert isinstance(last, Block)
    attended = _attend_at_end(last.attn, last.ln_1(x), layout)  # (B, D)
    read = _after(last, x[layout.end], attended)  # (B, D)
    return model.ln_final(read) @ model.text_projection


class _Layout(NamedTuple):
    """Where tokens are, in a row and side by side."""

    prefix: int  # P
    is_token: torch.Tensor  # (B, S) bool, of what is no padding
    place: torch.Tensor  # (B, S), of each token in the row of T; of padding, any
    end: torch.Tensor  # (B,), of the end tokens in the row
    mask: torch.Tensor  # (S, P + S) bool, which keys a query sees


def _lay_out(tokens: torch.Tensor, lengths: torch.Tensor) -> _Layout:
    same = (tokens == tokens[:1]).all(dim=0)  # (L,)
    prefix = min(int(same.cumprod(dim=0).sum()), int(lengths.min()) - 1)
    places = torch.arange(tokens.shape[1], device=tokens.device)  # (L,)
    is_token = places[prefix:] < lengths[:, None]  # (B, S)
    place = is_token.flatten().cumsum(dim=0).view_as(is_token) - 1 + prefix
    end = place.gather(1, lengths[:, None] - 1 - prefix)[:, 0]
    return _Layout(prefix, is_token, place, end, places <= places[prefix:, None])


def _attend(attention: Attention, x: torch.Tensor, layout: _Layout) -> torch.Tensor:
    """What each token attends to, before the projection: (T, D) -> (T, D)."""
    qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)  # (T, 3D)
    first_q, first_k, first_v = _heads(qkv[None, : layout.prefix], 3, attention)  # (1, H, P, D/H)
    q, k, v = _heads(qkv[layout.place], 3, attention)  # each (B, H, S, D/H)
    first = F.scaled_dot_product_attention(first_q, first_k, first_v, is_causal=True)[0]
    keys, values = _behind(first_k, k), _behind(first_v, v)  # (B, H, P + S, D/H)
    rest = F.scaled_dot_product_attention(q, keys, values, attn_mask=layout.mask)
    rest = rest.transpose(1, 2).flatten(2)[layout.is_token]  # (T - P, D)
    return torch.cat([first.transpose(0, 1).flatten(1), rest])


def _attend_at_end(attention: Attention, x: torch.Tensor, layout: _Layout) -> torch.Tensor:
    """The same of the end tokens alone: (T, D) -> (B, D)."""
    width = x.shape[-1]
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    (q,) = _heads(F.linear(x[layout.end], weight[:width], bias[:width])[:, None], 1, attention)
    kv = F.linear(x, weight[width:], bias[width:])  # (T, 2D)
    first = _heads(kv[None, : layout.prefix], 2, attention)
    k, v = _heads(kv[layout.place], 2, attention)
    keys, values = _behind(first[0], k), _behind(first[1], v)
    sees = F.pad(layout.is_token, (layout.prefix, 0), value=True)[:, None, None]  # (B, 1, 1, P+S)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=sees).flatten(1)


def _heads(x: torch.Tensor, parts: int, attention: Attention) -> tuple[torch.Tensor, ...]:
    """(B, L, parts * D) -> `parts` of (B, H, L, D/H)."""
    return x.unflatten(-1, (parts, attention.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _behind(first: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """(1, H, P, D/H) before each of (B, H, S, D/H)."""
    return torch.cat([first.expand(len(rest), -1, -1, -1), rest], dim=2)


def _after(block: Block, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """What a block does with what was attended to: (N, D) -> (N, D)."""
    x = x + block.attn.out_proj(attended)
    return x + block.mlp(block.ln_2(x))
