"""The pre-norm transformer that both towers share, with OpenAI's parameter names.

Every module takes padded rows (B, L, D) or, with `packed`, the packed tokens of all rows (T, D):
see `model/packed.py`.

Shapes: B batch, L tokens, T packed tokens, D width, H heads.
"""

from collections.abc import Callable

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
    "gelu_tanh": gelu_tanh,  # CLIPA's weights
}


class Transformer(nn.Module):
    """A stack of residual attention blocks, pooled at one token or not.

    With a position, the last block computes its query and its MLP for that token only.
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
    ) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.resblocks = nn.ModuleList(
            Block(width, heads, hidden, activation=activation, is_causal=is_causal)
            for _ in range(layers)
        )

    def forward(
        self,
        x: torch.Tensor,
        position: torch.Tensor | None = None,
        packed: Packed | None = None,
    ) -> torch.Tensor:
        """(B, L, D) -> (B, L, D), or (B, D) of the tokens at `position` (B,)."""
        *first, last = self.resblocks
        for block in first:
            x = block(x, None, packed)  # (B, L, D)
        return last(x, position, packed)  # (B, L, D) or (B, D)


class Block(nn.Module):
    """Attention, then a two-layer MLP, each with a residual."""

    def __init__(
        self, width: int, heads: int, hidden: int, *, activation: str, is_causal: bool
    ) -> None:
        super().__init__()
        self.attn = Attention(width, heads, is_causal=is_causal)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = MLP(width, hidden, activation)
        self.ln_2 = nn.LayerNorm(width)

    def forward(
        self,
        x: torch.Tensor,
        position: torch.Tensor | None = None,
        packed: Packed | None = None,
    ) -> torch.Tensor:
        """(B, L, D) -> (B, L, D), or (B, D) of the tokens at `position` (B,)."""
        attended = self.attn(self.ln_1(x), position, packed)
        if position is not None:
            x = _pick(x, position)  # (B, D)
        x = x + attended
        return x + self.mlp(self.ln_2(x))


class Attention(nn.Module):
    """Multi-head self-attention; parameters named and initialised as in nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int, *, is_causal: bool) -> None:
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
    ) -> torch.Tensor:
        """(B, L, D) -> (B, L, D), or (B, D) of the tokens at `position` (B,)."""
        if position is not None:
            return self._attend_at(x, position, packed)
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, L, 3D)
        if packed is not None:
            return self.out_proj(packed.attend(qkv, self.heads))  # (T, D)
        q, k, v = split_heads(qkv, 3, self.heads)  # each (B, H, L, D/H)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)  # (B, H, L, D/H)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # (B, L, D)

    def _attend_at(
        self, x: torch.Tensor, position: torch.Tensor, packed: Packed | None
    ) -> torch.Tensor:
        width = x.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        q = F.linear(_pick(x, position)[:, None], weight[:width], bias[:width])  # (B, 1, D)
        kv = F.linear(x, weight[width:], bias[width:])  # (B, L, 2D)
        if packed is not None:
            return self.out_proj(packed.attend_at_end(q, kv, self.heads))  # (B, D)
        (q,) = split_heads(q, 1, self.heads)  # (B, H, 1, D/H)
        k, v = split_heads(kv, 2, self.heads)  # each (B, H, L, D/H)
        mask = None
        if self.is_causal:  # the token attends to itself and those before it
            positions = torch.arange(x.shape[1], device=x.device)
            mask = (positions <= position[:, None])[:, None, None]  # (B, 1, 1, L)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, 1, D/H)
        return self.out_proj(x.flatten(1))  # (B, D)


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
