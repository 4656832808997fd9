"""CLIP: a vision tower, a text tower and a temperature (arXiv 2103.00020).

    pixels (B, 3, R, R) -> visual -> image features (B, E)
    tokens (B, L) -> embedding, transformer, end token -> text features (B, E)

Parameter names are OpenAI's. Those of the text tower have no prefix there, so they belong to CLIP
itself and not to a submodule.

Shapes: B batch, L tokens, D text width, E embedding, R resolution.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from leanclip.config.model import ModelConfig
from leanclip.config.sections import parse
from leanclip.model.packed import Packed, packed_layout
from leanclip.model.resnet import ModifiedResNet
from leanclip.model.transformer import Block, Transformer
from leanclip.model.vit import VisionTransformer
from leanclip.preprocess.text import Tokenizer

MAX_LOGIT_SCALE = math.log(100)  # the paper's bound on the temperature


class Features(NamedTuple):
    """The output of a forward pass: unit features of both towers, and exp(logit_scale)."""

    image: torch.Tensor  # (B, E)
    text: torch.Tensor  # (B, E)
    scale: torch.Tensor  # ()


class CLIP(nn.Module):
    """Both towers; takes the architecture keys of OpenAI's code and PASSL's `arch` dict.

    Args:
        arch: the settings of `leanclip.config.model.ModelConfig`, by name.

    Raises:
        ConfigError: an unknown or missing key, or a value that does not fit.
    """

    def __init__(self, **arch: Any) -> None:
        super().__init__()
        self.config = config = parse(ModelConfig, arch, where="CLIP")
        self.context_length = config.context_length
        self.tokenizer = Tokenizer(config.context_length)  # weights with another one set it
        self.uses_packing = False  # whether `forward` uses `encode_packed`
        self.visual = _vision_tower(config)
        width = config.transformer_width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.transformer = Transformer(
            width,
            config.transformer_layers,
            config.transformer_heads,
            activation=config.activation,
            is_causal=config.transformer_causal,
            mlp_ratio=config.transformer_mlp_ratio,
        )
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.logit_bias = None
        if config.logit_bias:  # SigLIP's start: arXiv 2303.15343, section 3.2
            self.logit_scale = nn.Parameter(torch.tensor(math.log(10)))
            self.logit_bias = nn.Parameter(torch.tensor(-10.0))
        self._initialize_text()

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (B, 3, R, R) -> raw image features (B, E)."""
        return self.visual(pixels)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids (B, L), L up to the context length -> raw text features (B, E).

        A causal tower pooled at the end token does not attend to what follows it, so these
        columns may be cut off. For every other tower they are restored as padding (id 0).
        """
        tokens = self._restore_padding(tokens)
        return self._read_texts(tokens, self._text_position(tokens), None)

    def encode_packed(self, tokens: torch.Tensor) -> torch.Tensor:
        """As `encode_text`, within rounding, without computing padding.

        It is `encode_text` if the tower attends to padding, or there is no text.
        """
        config = self.config
        if not (config.transformer_causal and config.transformer_pool == "argmax" and len(tokens)):
            return self.encode_text(tokens)
        packed = packed_layout(tokens)
        return self._read_texts(tokens[:, : packed.mask.shape[1]], packed.end, packed)

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor) -> Features:
        """Unit features of images and texts in float32, and the scale of their cosines.

        Pixels (B, 3, R, R) or tokens (B, L) may be replaced by the unit features (B, E) of a
        locked tower.
        """
        image, text = pixels, tokens
        if pixels.dim() != 2:
            image = F.normalize(self.encode_image(pixels).float(), dim=-1)
        if not tokens.is_floating_point():
            encode = self.encode_packed if self.uses_packing else self.encode_text
            text = F.normalize(encode(tokens).float(), dim=-1)
        return Features(image, text, self.logit_scale.float().exp())

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep exp(logit_scale) within [1, 100]; called after every optimiser step."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def parameter_count(self) -> int:
        """The number of values in all parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _read_texts(
        self, tokens: torch.Tensor, position: torch.Tensor, packed: Packed | None
    ) -> torch.Tensor:
        """Raw features (B, E) of tokens (B, L), pooled at `position` (B,)."""
        x = self.token_embedding(tokens)  # (B, L, D)
        x = x + self.positional_embedding[: tokens.shape[1]]
        if packed is not None:
            x = packed.pack(x)  # (T, D)
        x = self.transformer(x, position, packed)  # (B, D)
        return self.ln_final(x) @ self.text_projection  # (B, E)

    def _restore_padding(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L) padded to the context length, if the tower attends beyond the end token."""
        if self.config.transformer_causal and self.config.transformer_pool != "last":
            return tokens
        return F.pad(tokens, (0, max(0, self.context_length - tokens.shape[1])))  # (B, L)

    def _text_position(self, tokens: torch.Tensor) -> torch.Tensor:
        """The position that is pooled in each row of tokens (B, L): (B,)."""
        match self.config.transformer_pool:
            case "argmax":
                return tokens.argmax(dim=-1)
            case "first":
                return torch.zeros_like(tokens[:, 0])
            case "eos":
                return (tokens == self.config.transformer_eos_id).int().argmax(dim=-1)
            case "last":
                return torch.full_like(tokens[:, 0], tokens.shape[1] - 1)

    def _initialize_text(self) -> None:
        """OpenAI's initialisation of the text tower; the vision towers initialise themselves."""
        width, layers = self.config.transformer_width, self.config.transformer_layers
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)
        for block in self.transformer.resblocks:
            assert isinstance(block, Block)
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)


def _vision_tower(config: ModelConfig) -> VisionTransformer | ModifiedResNet:
    """A ViT if there is one number of layers, a ResNet if there are four."""
    if isinstance(config.vision_layers, tuple):
        return ModifiedResNet(
            input_resolution=config.image_resolution,
            layers=config.vision_layers,
            width=config.vision_width,
            heads=config.attention_heads,
            output_dim=config.embed_dim,
        )
    assert config.vision_patch_size is not None
    return VisionTransformer(
        input_resolution=config.image_resolution,
        patch_size=config.vision_patch_size,
        width=config.vision_width,
        layers=config.vision_layers,
        heads=config.attention_heads,
        output_dim=config.embed_dim,
        activation=config.activation,
        mlp_ratio=config.vision_mlp_ratio,
        pre_norm=config.pre_norm,
        patch_bias=config.patch_bias,
        pool=config.vision_pool,
        norm_after_pool=config.vision_norm_after_pool,
    )
