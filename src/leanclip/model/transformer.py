"""The transformer that both towers share, with OpenAI's parameter names.

Every module takes padded rows (B, L, D) or, with `packed`, the packed tokens of all rows (T, D):
see `model/packed.py`. Blocks are pre-norm, or post-norm as BERT's.

Shapes: B batch, L tokens, T packed tokens, D width, H heads.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from leanclip.model.packed import Packed, split_heads


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 x), in a form that saves one tensor of x's size for the backward pass."""
    return F.silu(1.702 * x) / 1.702


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU in the tanh approximation."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # functions that pickle
    "quick_gelu": quick_gelu,  # OpenAI's and PASSL's weights
    "gelu": F.gelu,  # most LAION and DataComp weights
    "gelu_tanh": gelu_tanh,  # CLIPA's and most of SigLIP's weights
}


class Keys(NamedTuple):
    """What attention needs besides the tokens."""

    mask: torch.Tensor | None = None  # (B, L) bool, of the tokens that are attended to; None: all
    # cosines and sines, of queries and keys: (2, L, D/2H), or (2, B, 1, L, D/2H) of each row
    rotation: torch.Tensor | None = None


ALL = Keys()


class Transformer(nn.Module):
    """A stack of residual attention blocks, pooled at one token or not.

    With a position, the last block computes its query and its MLP for that token only.

    Args:
        width: D.
        layers: number of blocks.
        heads: H.
        activation: a name in `ACTIVATIONS`.
        is_causal: a token attends to itself and those before it.
        mlp_ratio: hidden width of the MLPs over D, rounded down.
        norm_eps: of the LayerNorms.
        post_norm: LayerNorms follow the residuals.
        layer_scale: initial value of a factor of each residual branch and channel; None: none.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        *,
        activation: str,
        is_causal: bool,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-5,
        post_norm: bool = False,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.resblocks = nn.ModuleList(
            Block(
                width,
                heads,
                hidden,
                activation=activation,
                is_causal=is_causal,
                norm_eps=norm_eps,
                post_norm=post_norm,
                layer_scale=layer_scale,
            )
            for _ in range(layers)
        )

    def forward(
        self,
        x: torch.Tensor,
        position: torch.Tensor | None = None,
        packed: Packed | None = None,
        keys: Keys = ALL,
    ) -> torch.Tensor:
        """(B, L, D) -> (B, L, D), or (B, D) of the tokens at `position` (B,)."""
        *first, last = self.resblocks
        for block in first:
            x = block(x, None, packed, keys)  # (B, L, D)
        return last(x, position, packed, keys)  # (B, L, D) or (B, D)


class Block(nn.Module):
    """Attention, then a two-layer MLP, each with a residual."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        activation: str,
        is_causal: bool,
        norm_eps: float = 1e-5,
        post_norm: bool = False,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.attn = Attention(width, heads, is_causal=is_causal)
        self.ln_1 = nn.LayerNorm(width, norm_eps)
        self.mlp = MLP(width, hidden, activation)
        self.ln_2 = nn.LayerNorm(width, norm_eps)
        self.ls_1 = self.ls_2 = None
        if layer_scale is not None:
            self.ls_1, self.ls_2 = LayerScale(width, layer_scale), LayerScale(width, layer_scale)

    def forward(
        self,
        x: torch.Tensor,
        position: torch.Tensor | None = None,
        packed: Packed | None = None,
        keys: Keys = ALL,
    ) -> torch.Tensor:
        """(B, L, D) -> (B, L, D), or (B, D) of the tokens at `position` (B,)."""
        attended = self.attn(x if self.post_norm else self.ln_1(x), position, packed, keys)
        if position is not None:
            x = _pick(x, position)  # (B, D)
        if self.post_norm:
            x = self.ln_1(x + attended)
            return self.ln_2(x + self.mlp(x))
        x = x + (self.ls_1(attended) if self.ls_1 else attended)
        changed = self.mlp(self.ln_2(x))
        return x + (self.ls_2(changed) if self.ls_2 else changed)


class LayerScale(nn.Module):
    """A learned factor of each channel (arXiv 2103.17239)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        return x * self.gamma


class Attention(nn.Module):
    """Multi-head attention; parameters named and initialised as in nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int, *, is_causal: bool = False) -> None:
        super().__init__()
        self.heads, self.is_causal = heads, is_causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        x: torch.Tensor,
        position: torch.Tensor | None = None,
        packed: Packed | None = None,
        keys: Keys = ALL,
    ) -> torch.Tensor:
        """Self-attention: (B, L, D) -> (B, L, D), or (B, D) of the tokens at `position` (B,)."""
        if position is not None:
            return self._attend_at(x, position, packed, keys)
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, L, 3D)
        if packed is not None:
            return self.out_proj(packed.attend(qkv, self.heads))  # (T, D)
        q, k, v = split_heads(qkv, 3, self.heads)  # each (B, H, L, D/H)
        if keys.rotation is not None:
            q, k = rotate(q, keys.rotation), rotate(k, keys.rotation)
        mask, is_causal = None, self.is_causal
        if keys.mask is not None:
            mask, is_causal = keys.mask[:, None, None], False  # (B, 1, 1, L)
            if self.is_causal:
                mask = mask & torch.ones(x.shape[1:2] * 2, dtype=torch.bool, device=x.device).tril()
        x = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)  # (B, H, L, D/H)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # (B, L, D)

    def attend_from(
        self, query: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention of one query (B, 1, D) to tokens (B, L, D) -> (B, D).

        `mask` (B, L) bool: the tokens that it attends to.
        """
        q, k, v = self._one_query(query, x)
        mask = None if mask is None else mask[:, None, None]  # (B, 1, 1, L)
        x = F.scaled_dot_product_attention(q, k, v, mask)  # (B, H, 1, D/H)
        return self.out_proj(x.flatten(1))  # (B, D)

    def _one_query(self, query: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The query (B, H, 1, D/H) of one token, keys and values (B, H, L, D/H) of all."""
        width = x.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        (q,) = split_heads(F.linear(query, weight[:width], bias[:width]), 1, self.heads)
        k, v = split_heads(F.linear(x, weight[width:], bias[width:]), 2, self.heads)
        return q, k, v

    def _attend_at(
        self, x: torch.Tensor, position: torch.Tensor, packed: Packed | None, keys: Keys
    ) -> torch.Tensor:
        if packed is not None:
            width = x.shape[-1]
            weight, bias = self.in_proj_weight, self.in_proj_bias
            q = F.linear(_pick(x, position)[:, None], weight[:width], bias[:width])  # (B, 1, D)
            kv = F.linear(x, weight[width:], bias[width:])  # (T, 2D)
            return self.out_proj(packed.attend_at_end(q, kv, self.heads))  # (B, D)
        if keys.rotation is not None:  # with a class token, which is at the origin
            return _pick(self(x, None, None, keys), position)
        mask = keys.mask
        if self.is_causal:  # the token attends to itself and those before it
            positions = torch.arange(x.shape[1], device=x.device)
            before = positions <= position[:, None]  # (B, L)
            mask = before if mask is None else before & mask
        return self.attend_from(_pick(x, position)[:, None], x, mask)


class MLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        return self.c_proj(self.activation(self.c_fc(x)))


def _pick(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """(B, L, D) at one position (B,) of each row, or (T, D) at B of its rows -> (B, D)."""
    return x[position] if x.dim() == 2 else x[torch.arange(x.shape[0], device=x.device), position]


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotary positions (arXiv 2104.09864): neighbouring channels of (B, H, L, D/H) are rotated."""
    cos, sin = rotation
    even, odd = x.float()[..., 0::2], x.float()[..., 1::2]  # (B, H, L, D/2H)
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return rotated.flatten(-2).to(x.dtype)
