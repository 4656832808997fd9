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
}


class Transformer(nn.Module):
    """A stack of residual attention blocks: (B, L, D) -> (B, L, D)."""

    def __init__(
        self, width: int, layers: int, heads: int, *, activation: str, is_causal: bool
    ) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(
            Block(width, heads, activation=activation, is_causal=is_causal) for _ in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run every block in turn."""
        for block in self.resblocks:
            x = block(x)
        return x


class Block(nn.Module):
    """Attention, then a two-layer perceptron of four times the width, each with a residual."""

    def __init__(self, width: int, heads: int, *, activation: str, is_causal: bool) -> None:
        super().__init__()
        self.attn = Attention(width, heads, is_causal=is_causal)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width, activation)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, D) -> (B, L, D)."""
        x = x + self.attn(self.ln_1(x))
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, D) -> (B, L, D)."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, L, 3D)
        qkv = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, H, L, D/H)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)  # (B, H, L, D/H)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # (B, L, D)


class MLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.c_proj(self.activation(self.c_fc(x)))
