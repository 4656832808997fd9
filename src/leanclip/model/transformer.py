"""The pre-norm transformer that both towers share, with OpenAI's parameter names.

Shapes: B batch, L tokens, D width, H heads.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # OpenAI's and PASSL's weights
    "gelu": F.gelu,  # most LAION and DataComp weights
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # CLIPA's weights
}


class Transformer(nn.Module):
    """A stack of residual attention blocks, read at one token or at all.

    Read at one, the last block computes its query and its perceptron for that token alone:
    nothing else of what it would give is used.
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

    def forward(self, x: torch.Tensor, position: torch.Tensor | None = None) -> torch.Tensor:
        """(B, L, D) -> (B, L, D), or (B, D) of the tokens at `position` (B,) alone."""
        *first, last = self.resblocks
        for block in first:
            x = block(x)  # (B, L, D)
        return last(x, position)  # (B, L, D) or (B, D)


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each with a residual."""

    def __init__(
        self, width: int, heads: int, hidden: int, *, activation: str, is_causal: bool
    ) -> None:
        super().__init__()
        self.attn = Attention(width, heads, is_causal=is_causal)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = MLP(width, hidden, activation)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, position: torch.Tensor | None = None) -> torch.Tensor:
        """(B, L, D) -> (B, L, D), or (B, D) of the tokens at `position` (B,) alone."""
        attended = self.attn(self.ln_1(x), position)
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

    def forward(self, x: torch.Tensor, position: torch.Tensor | None = None) -> torch.Tensor:
        """(B, L, D) -> (B, L, D), or (B, D) of the tokens at `position` (B,) alone."""
        if position is not None:
            return self._attend_at(x, position)
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, L, 3D)
        q, k, v = self._split_heads(qkv, 3)  # each (B, H, L, D/H)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)  # (B, H, L, D/H)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # (B, L, D)

    def _attend_at(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        width = x.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        q = F.linear(_pick(x, position)[:, None], weight[:width], bias[:width])  # (B, 1, D)
        (q,) = self._split_heads(q, 1)  # (B, H, 1, D/H)
        kv = F.linear(x, weight[width:], bias[width:])  # (B, L, 2D)
        k, v = self._split_heads(kv, 2)  # each (B, H, L, D/H)
        mask = None
        if self.is_causal:  # the token sees itself and what stands before it
            places = torch.arange(x.shape[1], device=x.device)
            mask = (places <= position[:, None])[:, None, None]  # (B, 1, 1, L)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, 1, D/H)
        return self.out_proj(x.flatten(1))  # (B, D)

    def _split_heads(self, x: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
        """(B, L, parts * D) -> `parts` of (B, H, L, D/H)."""
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


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
    """(B, L, D) at one position (B,) of each -> (B, D)."""
    return x[torch.arange(x.shape[0], device=x.device), position]
