"""CLIP with the modules of OpenAI's package, over the same tensors as `leanclip.CLIP`.

    image (B, 3, R, R) -> visual -> (B, E)
    text (B, L) -> token_embedding -> transformer -> end token -> ln_final, projection -> (B, E)

Other code reaches into this model, so it cannot be `leanclip.CLIP`, which computes the same faster:
names and order of parameters and modules, the arguments of every module, length-first sequences
(L, B, D), `nn.MultiheadAttention`, and outputs of every block for all tokens are OpenAI's.

Further arguments are those that other published weights need, named as in `leanclip.CLIP`; their
defaults are OpenAI's architecture.

Shapes: B batch, L tokens, P patches, D width, E embedding, R resolution.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from leanclip.config.model import ModelConfig
from leanclip.config.sections import to_plain
from leanclip.errors import WeightsError
from leanclip.model.skip_init import SkipInit
from leanclip.openai.resnet import ModifiedResNet
from leanclip.weights.openai import from_state_dict

__all__ = [
    "CLIP",
    "LayerNorm",
    "QuickGELU",
    "ResidualAttentionBlock",
    "Transformer",
    "VisionTransformer",
    "build_model",
    "convert_weights",
]


class LayerNorm(nn.LayerNorm):
    """LayerNorm in float32 at least; the output has the input's type."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        wide = torch.promote_types(input.dtype, torch.float32)
        weight, bias = (p if p is None else p.to(wide) for p in (self.weight, self.bias))
        x = F.layer_norm(input.to(wide), self.normalized_shape, weight, bias, self.eps)
        return x.to(input.dtype)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "quick_gelu": QuickGELU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
}


class ResidualAttentionBlock(nn.Module):
    """Attention, then a two-layer perceptron, each after a LayerNorm and with a residual.

    Args:
        d_model: D.
        n_head: attention heads.
        attn_mask: (L, L), added to the attention logits; None: full attention.
        activation: of the perceptron; see `leanclip.config.ModelConfig`.
        mlp_ratio: the perceptron's hidden width over D, rounded down.
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        attn_mask: torch.Tensor | None = None,
        *,
        activation: str = "quick_gelu",
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        hidden = int(d_model * mlp_ratio)
        self.attn = nn.MultiheadAttention(d_model, n_head)
        self.ln_1 = LayerNorm(d_model)
        parts = {"c_fc": nn.Linear(d_model, hidden), "gelu": _ACTIVATIONS[activation]()}
        self.mlp = nn.Sequential(OrderedDict(parts, c_proj=nn.Linear(hidden, d_model)))
        self.ln_2 = LayerNorm(d_model)
        self.attn_mask = attn_mask  # no buffer: OpenAI's state dict has none

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        """Self-attention, (L, B, D) -> (L, B, D)."""
        mask = self.attn_mask
        if mask is not None:
            mask = self.attn_mask = mask.to(x.device, x.dtype)
            mask = mask[: x.shape[0], : x.shape[0]]  # a text may be shorter than the context
        return self.attn(x, x, x, need_weights=False, attn_mask=mask)[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(L, B, D) -> (L, B, D)."""
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks.

    Args:
        width: D.
        layers: number of blocks.
        heads: attention heads.
        attn_mask: see `ResidualAttentionBlock`.
        settings: further arguments of the blocks.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        attn_mask: torch.Tensor | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.width, self.layers = width, layers
        self.resblocks = nn.Sequential(
            *(ResidualAttentionBlock(width, heads, attn_mask, **settings) for _ in range(layers))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(L, B, D) -> (L, B, D)."""
        return self.resblocks(x)


class VisionTransformer(nn.Module):
    """ViT with a class token (arXiv 2103.00020, section 2.4).

    If `proj` is set to None, features have the transformer's width.

    Args:
        input_resolution: side of the square image, in pixels.
        patch_size: side of a patch, in pixels.
        width: D.
        layers: number of blocks.
        heads: attention heads.
        output_dim: E.
        pre_norm: as in `leanclip.config.ModelConfig`, as are the next.
        patch_bias: see there.
        vision_pool: see there.
        vision_norm_after_pool: see there.
        settings: further arguments of the blocks.
    """

    def __init__(
        self,
        input_resolution: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        output_dim: int,
        *,
        pre_norm: bool = True,
        patch_bias: bool = False,
        vision_pool: str = "tok",
        vision_norm_after_pool: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.input_resolution, self.output_dim = input_resolution, output_dim
        self.pool, self.norm_after_pool = vision_pool, vision_norm_after_pool
        patches = (input_resolution // patch_size) ** 2
        std = width**-0.5
        # In the order of OpenAI's code, so that a seed gives the same initial values.
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=patch_bias)
        self.class_embedding = nn.Parameter(torch.empty(width).normal_(std=std))
        self.positional_embedding = nn.Parameter(torch.empty(patches + 1, width).normal_(std=std))
        self.ln_pre = LayerNorm(width) if pre_norm else nn.Identity()
        self.transformer = Transformer(width, layers, heads, **settings)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, output_dim).normal_(std=std))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (B, 3, R, R) -> features (B, E), not normalised."""
        x = self.conv1(x)  # (B, D, R/p, R/p)
        x = x.flatten(2).transpose(1, 2)  # (B, P, D)
        first = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)  # (B, 1, D)
        x = torch.cat([first, x], dim=1)  # (B, P+1, D)
        x = self.ln_pre(x + self.positional_embedding.to(x.dtype))
        x = self.transformer(x.permute(1, 0, 2))  # (P+1, B, D)
        x = self._read(x.permute(1, 0, 2))  # (B, D)
        return x if self.proj is None else x @ self.proj  # (B, E)

    def _read(self, x: torch.Tensor) -> torch.Tensor:
        """The last LayerNorm and the pool: (B, P+1, D) -> (B, D)."""
        if self.pool == "tok":
            return self.ln_post(x[:, 0])
        if self.norm_after_pool:
            return self.ln_post(x[:, 1:].mean(dim=1))
        return self.ln_post(x[:, 1:]).mean(dim=1)


class CLIP(nn.Module):
    """Both towers, with OpenAI's arguments in their order and keywords as in `leanclip.CLIP`.

    `vision`: keywords of a `VisionTransformer`; a ResNet has none.
    """

    def __init__(
        self,
        embed_dim: int,
        image_resolution: int,
        vision_layers: int | tuple[int, int, int, int] | list[int],
        vision_width: int,
        vision_patch_size: int | None,
        context_length: int,
        vocab_size: int,
        transformer_width: int,
        transformer_heads: int,
        transformer_layers: int,
        *,
        vision_heads: int | None = None,
        vision_mlp_ratio: float = 4.0,
        transformer_mlp_ratio: float = 4.0,
        transformer_pool: str = "argmax",
        transformer_eos_id: int | None = None,
        transformer_causal: bool = True,
        activation: str = "quick_gelu",
        logit_bias: bool = False,
        **vision: Any,
    ) -> None:
        super().__init__()
        self.context_length, self.vocab_size = context_length, vocab_size
        self.transformer_pool, self.transformer_causal = transformer_pool, transformer_causal
        self.transformer_eos_id = transformer_eos_id
        if isinstance(vision_layers, tuple | list):
            heads = vision_heads or vision_width * 32 // 64
            self.visual = ModifiedResNet(
                vision_layers, embed_dim, heads, image_resolution, vision_width
            )
        else:
            assert vision_patch_size
            self.visual = VisionTransformer(
                image_resolution,
                vision_patch_size,
                vision_width,
                vision_layers,
                vision_heads or vision_width // 64,
                embed_dim,
                activation=activation,
                mlp_ratio=vision_mlp_ratio,
                **vision,
            )
        self.transformer = Transformer(
            transformer_width,
            transformer_layers,
            transformer_heads,
            self.build_attention_mask() if transformer_causal else None,
            activation=activation,
            mlp_ratio=transformer_mlp_ratio,
        )
        self.token_embedding = nn.Embedding(vocab_size, transformer_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, transformer_width))
        self.ln_final = LayerNorm(transformer_width)
        self.text_projection = nn.Parameter(torch.empty(transformer_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if logit_bias else None
        self.initialize_parameters()

    def initialize_parameters(self) -> None:
        """Initialise the text tower and a ResNet's attention pool."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        if isinstance(self.visual, ModifiedResNet):
            self.visual.initialize_parameters()
        width, layers = self.transformer.width, self.transformer.layers
        block: Any  # of this module, or another that took its place
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        if self.text_projection is not None:
            nn.init.normal_(self.text_projection, std=width**-0.5)

    def build_attention_mask(self) -> torch.Tensor:
        """The causal mask (L, L) that is added to the attention logits: -inf above the diagonal."""
        size = (self.context_length, self.context_length)
        # On the CPU even if parameters are on the meta device: it is not in the state dict.
        return torch.full(size, -math.inf, device="cpu").triu_(1)

    @property
    def dtype(self) -> torch.dtype:
        """The type that the towers compute in."""
        return self.visual.conv1.weight.dtype

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (B, 3, R, R) -> image features (B, E), not normalised."""
        return self.visual(image.to(self.dtype))

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        """Token ids (B, L), L up to the context -> text features (B, E), not normalised."""
        if not self.transformer_causal or self.transformer_pool == "last":  # it attends to padding
            text = F.pad(text, (0, max(0, self.context_length - text.shape[1])))
        x = self.token_embedding(text).to(self.dtype)  # (B, L, D)
        x = x + self.positional_embedding[: text.shape[1]].to(self.dtype)
        x = self.transformer(x.permute(1, 0, 2))  # (L, B, D)
        x = self.ln_final(x.permute(1, 0, 2)).to(self.dtype)  # (B, L, D)
        rows = torch.arange(x.shape[0], device=x.device)
        x = x[rows, self._position(text)]  # (B, D)
        return x if self.text_projection is None else x @ self.text_projection  # (B, E)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits per image (B, T) and per text (T, B): exp(logit_scale) times the cosines."""
        images, texts = self.encode_image(image), self.encode_text(text)
        images = images / images.norm(dim=-1, keepdim=True)
        texts = texts / texts.norm(dim=-1, keepdim=True)
        logits = self.logit_scale.exp() * images @ texts.t()
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        return logits, logits.t()

    def _position(self, text: torch.Tensor) -> torch.Tensor:
        """Where each text is pooled, (B,); the end token has the highest id."""
        match self.transformer_pool:
            case "argmax":
                return text.argmax(dim=-1)
            case "eos":
                return (text == self.transformer_eos_id).int().argmax(dim=-1)
            case "first":
                return torch.zeros_like(text[:, 0], dtype=torch.int64)
            case "last":
                return torch.full_like(text[:, 0], text.shape[1] - 1, dtype=torch.int64)
        raise ValueError(f"transformer_pool: there is no {self.transformer_pool}")


def openais_settings(config: ModelConfig) -> dict[str, Any]:
    """The arguments of `CLIP` for an architecture without extensions."""
    settings = to_plain(config) | {"activation": config.activations[0]}
    taken = {*signature(CLIP).parameters, *signature(VisionTransformer).parameters}
    return {name: value for name, value in settings.items() if name in taken}


def convert_weights(model: nn.Module) -> None:
    """Convert convolutions, linear layers, attention and projections to float16, in place.

    As in OpenAI's package, LayerNorms, embeddings, BatchNorms and `logit_scale` keep their type.
    """
    for module in model.modules():
        names = ["text_projection", "proj"]
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            names += ["weight", "bias"]
        if isinstance(module, nn.MultiheadAttention):
            names += ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
            names += ["in_proj_bias", "bias_k", "bias_v"]
        for name in names:
            tensor = getattr(module, name, None)
            if isinstance(tensor, torch.Tensor):
                tensor.data = tensor.data.half()


def build_model(state_dict: Mapping[str, torch.Tensor]) -> CLIP:
    """The model of OpenAI's state dict in evaluation mode, with weights in float16.

    Raises:
        RuntimeError: the tensors are not CLIP's, or do not fit each other.
    """
    try:
        weights = from_state_dict(Path("state_dict"), state_dict, None)
        if weights.model is None:
            raise WeightsError("state_dict: no heads of 64 channels fit its widths")
    except WeightsError as error:
        raise RuntimeError(str(error)) from None
    with SkipInit():
        model = CLIP(**openais_settings(weights.model))
    convert_weights(model)
    model.load_state_dict(weights.tensors)
    return model.eval()
