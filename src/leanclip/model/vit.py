"""The Vision Transformer towers: normalised pixels -> image features.

    pixels or patches -> embedding, positions -> blocks -> pool -> projection

Shapes: B batch, R resolution, p patch size, P patches, K patches kept, T tokens (the patches, and
a class token if there is one), D width, E embedding.
"""

import torch
from torch import nn
from torch.nn import functional as F

from leanclip.config.model import ModelConfig
from leanclip.model import positions
from leanclip.model.pooling import AttentionPool, QueryPool
from leanclip.model.transformer import Keys, Transformer
from leanclip.preprocess.patches import Patches


class VisionTransformer(nn.Module):
    """ViT as in OpenAI's CLIP (arXiv 2103.00020, section 2.4), with the options of `ModelConfig`.

    `patch_dropout` is the fraction of patches left out in training (arXiv 2212.00794), drawn for
    each image from the default generator.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert isinstance(config.vision_layers, int)
        assert config.vision_patch_size is not None
        self.config = config
        self.input_resolution = config.image_resolution
        self.patch_dropout = 0.0
        width, patch, eps = config.vision_width, config.vision_patch_size, config.vision_norm_eps
        grid = config.image_resolution // patch
        std = width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=config.patch_bias)
        self.class_embedding = None
        if config.vision_class_token:
            self.class_embedding = nn.Parameter(torch.empty(width).normal_(std=std))
        count = grid**2 + config.vision_class_token
        self.positional_embedding = nn.Parameter(torch.empty(count, width).normal_(std=std))
        self.ln_pre = nn.LayerNorm(width, eps) if config.pre_norm else nn.Identity()
        self.transformer = Transformer(
            width,
            config.vision_layers,
            config.attention_heads,
            activation=config.activations[0],
            is_causal=False,
            mlp_ratio=config.vision_mlp_ratio,
            norm_eps=eps,
            layer_scale=config.vision_layer_scale,
        )
        pooled = config.embed_dim if config.vision_pool == "queries" else width
        self.ln_post = nn.LayerNorm(pooled, eps)
        self.attn_pool = _attention_pool(config)
        self.proj = self.proj_bias = None
        if config.vision_projection == "linear":
            self.proj = nn.Parameter(torch.empty(pooled, config.embed_dim).normal_(std=std))
        if config.vision_projection_bias:
            self.proj_bias = nn.Parameter(torch.zeros(config.embed_dim))

    def forward(self, pixels: torch.Tensor | Patches) -> torch.Tensor:
        """Normalised pixels (B, 3, R, R), or patches -> features (B, E), not normalised.

        Only resized positions take patches, and pixels of any size.
        """
        x, mask = self._embed(pixels)  # (B, T, D), (B, T)
        keys = Keys(mask, self.rotation(x))
        if self.training and self.patch_dropout:
            x, keys = self._drop_patches(x, keys)  # (B, [1 +] K, D)
        x = self._pool(self.ln_pre(x), keys)  # (B, D)
        if self.proj is not None:
            x = x @ self.proj  # (B, E)
        return x if self.proj_bias is None else x + self.proj_bias

    def _embed(self, pixels: torch.Tensor | Patches) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens with their positions (B, T, D), and which are no padding; None: all."""
        if isinstance(pixels, Patches):
            weight = self.conv1.weight.permute(0, 2, 3, 1).flatten(1)  # (D, 3p²)
            x = F.linear(pixels.values, weight, self.conv1.bias)  # (B, P, D)
            each = positions.resized_to_each(
                self.positional_embedding, pixels.shapes, x.shape[1]
            )  # (B, P, D)
            return x + each, pixels.mask
        x = self.conv1(pixels)  # (B, D, h, w)
        h, w = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)  # (B, P, D)
        if self.config.vision_positions == "resized":
            return x + positions.resized(self.positional_embedding, h, w), None
        if self.class_embedding is not None:
            class_token = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)  # (B, 1, D)
            x = torch.cat([class_token, x], dim=1)  # (B, P+1, D)
        return x + self.positional_embedding, None

    def rotation(self, x: torch.Tensor) -> torch.Tensor | None:
        """Cosines and sines of rotary positions for tokens (B, T, D); None: the tower has none."""
        config = self.config
        if config.vision_positions != "rotary":
            return None
        assert config.vision_patch_size is not None
        return positions.rotary(
            config.image_resolution // config.vision_patch_size,
            config.vision_width // config.attention_heads,
            class_token=config.vision_class_token,
            scaled_to=config.vision_rotary_grid,
        ).to(x.device)

    def _drop_patches(self, x: torch.Tensor, keys: Keys) -> tuple[torch.Tensor, Keys]:
        """The class token and K patches drawn for each image: (B, T, D) -> (B, [1 +] K, D).

        Of patches with a mask, each image keeps its fraction, and padding after them.
        """
        first = int(self.class_embedding is not None)
        images, patches = len(x), x.shape[1] - first
        count = self._patches_kept(torch.tensor(patches))
        order = torch.rand(images, patches, device=x.device)
        mask, rotation = keys
        if mask is not None:  # of a tower without a class token
            order = order.masked_fill(~mask, -1.0)
            numbers = torch.arange(int(count), device=x.device)  # (K,)
            mask = numbers < self._patches_kept(mask.sum(dim=1, keepdim=True))  # (B, K)
        kept = order.topk(int(count)).indices + first  # (B, K)
        if first:
            kept = F.pad(kept, (1, 0))  # (B, 1 + K), the class token's 0 first
        if rotation is not None:
            rotation = rotation[:, kept].unsqueeze(2)  # (2, B, 1, [1 +] K, D/2H)
        return x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1])), Keys(mask, rotation)

    def _patches_kept(self, patches: torch.Tensor) -> torch.Tensor:
        """How many of an image's patches are not dropped; at least one."""
        return (patches * (1 - self.patch_dropout)).round().long().clamp(min=1)

    def _pool(self, x: torch.Tensor, keys: Keys) -> torch.Tensor:
        """The blocks, the last LayerNorm and the pool: (B, T, D) -> (B, D)."""
        if self.config.vision_pool == "tok":
            position = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)  # (B,)
            return self.ln_post(self.transformer(x, position, None, keys))  # (B, D)
        x = self.transformer(x, None, None, keys)  # (B, T, D)
        if isinstance(self.attn_pool, AttentionPool):
            return self.attn_pool(self.ln_post(x), keys.mask)  # (B, D)
        if isinstance(self.attn_pool, QueryPool):
            return self.ln_post(self.attn_pool(x))  # (B, E)
        if self.class_embedding is not None:
            x = x[:, 1:]  # (B, P, D)
        if self.config.vision_norm_after_pool:
            return self.ln_post(masked_mean(x, keys.mask))  # (B, D)
        return masked_mean(self.ln_post(x), keys.mask)  # (B, D)


def masked_mean(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean of the tokens (B, T, D) in a mask (B, T), or of all: (B, D)."""
    if mask is None:
        return x.mean(dim=1)
    weights = mask.to(x.dtype)[..., None]  # (B, T, 1)
    return (x * weights).sum(dim=1) / weights.sum(dim=1)


def _attention_pool(config: ModelConfig) -> AttentionPool | QueryPool | None:
    width, eps = config.vision_width, config.vision_norm_eps
    if config.vision_pool == "attn":
        return AttentionPool(
            width,
            config.pool_heads,
            int(width * (config.vision_pool_mlp_ratio or config.vision_mlp_ratio)),
            activation=config.activations[0],
            norm_eps=eps,
        )
    if config.vision_pool == "queries":
        assert config.vision_pool_queries is not None
        queries, heads = config.vision_pool_queries, config.pool_heads
        return QueryPool(queries, width, heads, config.embed_dim, norm_eps=eps)
    return None
