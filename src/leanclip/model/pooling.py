"""Pooling of a ViT's tokens by attention of learned queries.

Shapes: B batch, L tokens, D width, H heads, E embedding.
"""

import torch
from torch import nn
from torch.nn import functional as F

from leanclip.model.transformer import MLP, Attention


class AttentionPool(nn.Module):
    """One learned query, then an MLP with a residual (SigLIP, PE-Core).

    Parameters are named as in PE-Core.

    Args:
        width: D.
        heads: H.
        hidden: hidden width of the MLP.
        activation: a name in `ACTIVATIONS`.
        norm_eps: of the LayerNorm.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, *, activation: str, norm_eps: float
    ) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, width).normal_(std=width**-0.5))
        self.attn = Attention(width, heads)
        self.layernorm = nn.LayerNorm(width, norm_eps)
        self.mlp = MLP(width, hidden, activation)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens (B, L, D), of which `mask` (B, L) are attended to -> (B, D)."""
        x = self.attn.attend_from(self.probe.to(x.dtype).expand(x.shape[0], -1, -1), x, mask)
        return x + self.mlp(self.layernorm(x))


class QueryPool(nn.Module):
    """Several learned queries of another width, of which only the first is computed (CoCa).

    Parameters are named as in open_clip; the other queries are there for CoCa's decoder.

    Args:
        queries: their number.
        width: D.
        heads: H.
        output_dim: E, the width of the queries.
        norm_eps: of the LayerNorms.
    """

    def __init__(
        self, queries: int, width: int, heads: int, output_dim: int, *, norm_eps: float
    ) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(queries, output_dim).normal_())
        self.attn = CrossAttention(output_dim, width, heads)
        self.ln_q = nn.LayerNorm(output_dim, norm_eps)
        self.ln_k = nn.LayerNorm(width, norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L, D) -> (B, E)."""
        return self.attn(self.ln_q(self.query[:1]), self.ln_k(x))


class CrossAttention(nn.Module):
    """As nn.MultiheadAttention with keys of another width than the queries."""

    def __init__(self, width: int, key_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj_weight = nn.Parameter(torch.empty(width, width))
        self.k_proj_weight = nn.Parameter(torch.empty(width, key_width))
        self.v_proj_weight = nn.Parameter(torch.empty(width, key_width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        for weight in (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """A query (1, E) and tokens (B, L, D) -> (B, E)."""
        bias_q, bias_k, bias_v = self.in_proj_bias.chunk(3)
        q = F.linear(query[None], self.q_proj_weight, bias_q).expand(x.shape[0], -1, -1)
        k = F.linear(x, self.k_proj_weight, bias_k)
        v = F.linear(x, self.v_proj_weight, bias_v)
        q, k, v = (one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v)  # (B, H, 1, E/H)
        return self.out_proj(x.flatten(1))  # (B, E)
