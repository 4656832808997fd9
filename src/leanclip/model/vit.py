"""The Vision Transformer tower of CLIP: normalised pixels -> image features.

Shapes: B batch, R resolution, p patch size, P patches, K patches kept, D width,
E embedding.
"""

import torch
from torch import nn
from torch.nn import functional as F

from leanclip.model.transformer import Transformer


class VisionTransformer(nn.Module):
    """ViT with a class token, as in OpenAI's CLIP (arXiv 2103.00020, section 2.4).

    `patch_dropout` is the fraction of patches left out in training (arXiv 2212.00794), drawn for
    each image from the default generator.

    Args:
        input_resolution: side of the square image, in pixels.
        patch_size: side of a patch, in pixels; divides the resolution.
        width: D, the width of the transformer.
        layers: number of blocks.
        heads: attention heads; OpenAI's models have width / 64.
        output_dim: E.
        activation: a name in `ACTIVATIONS`.
        mlp_ratio: hidden width of the MLPs over D, rounded down.
        pre_norm: LayerNorm before the first block.
        patch_bias: a bias in the patch embedding.
        pool: "tok": the class token; "avg": the mean of the patches (open_clip's `pool_type`).
        norm_after_pool: with "avg", `ln_post` comes after the mean (`final_ln_after_pool`).
    """

    def __init__(
        self,
        *,
        input_resolution: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        output_dim: int,
        activation: str = "quick_gelu",
        mlp_ratio: float = 4.0,
        pre_norm: bool = True,
        patch_bias: bool = False,
        pool: str = "tok",
        norm_after_pool: bool = False,
    ) -> None:
        super().__init__()
        self.input_resolution = input_resolution
        self.pool, self.norm_after_pool = pool, norm_after_pool
        self.patch_dropout = 0.0
        patches = (input_resolution // patch_size) ** 2
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=patch_bias)
        std = width**-0.5
        self.class_embedding = nn.Parameter(torch.empty(width).normal_(std=std))
        self.positional_embedding = nn.Parameter(torch.empty(patches + 1, width).normal_(std=std))
        self.ln_pre = nn.LayerNorm(width) if pre_norm else nn.Identity()
        self.transformer = Transformer(
            width, layers, heads, activation=activation, is_causal=False, mlp_ratio=mlp_ratio
        )
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, output_dim).normal_(std=std))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (B, 3, R, R) -> features (B, E), not normalised."""
        x = self.conv1(pixels)  # (B, D, R/p, R/p)
        x = x.flatten(2).transpose(1, 2)  # (B, P, D)
        class_token = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)  # (B, 1, D)
        x = torch.cat([class_token, x], dim=1)  # (B, P+1, D)
        x = x + self.positional_embedding
        if self.training and self.patch_dropout:
            x = self._drop_patches(x)  # (B, K+1, D)
        x = self.ln_pre(x)
        return self._encode(x) @ self.proj  # (B, E)

    def _drop_patches(self, x: torch.Tensor) -> torch.Tensor:
        """The class token and K patches drawn for each image: (B, P+1, D) -> (B, K+1, D)."""
        images, patches = len(x), x.shape[1] - 1
        count = max(1, round(patches * (1 - self.patch_dropout)))
        drawn = torch.rand(images, patches, device=x.device).topk(count).indices  # (B, K)
        positions = F.pad(drawn + 1, (1, 0))  # (B, K+1), the class token's 0 first
        return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        """The blocks, the last LayerNorm and the pool: (B, P+1, D) -> (B, D)."""
        if self.pool == "tok":
            position = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)  # (B,)
            return self.ln_post(self.transformer(x, position))  # (B, D)
        x = self.transformer(x)[:, 1:]  # (B, P, D)
        if self.norm_after_pool:
            return self.ln_post(x.mean(dim=1))  # (B, D)
        return self.ln_post(x).mean(dim=1)  # (B, D)
