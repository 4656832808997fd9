"""CLIP: a vision tower, a text tower and a temperature (arXiv 2103.00020).

    pixels (B, 3, R, R) -> visual -> image features (B, E)
    tokens (B, L) -> embedding, transformer, pool, projection -> text features (B, E)

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
from leanclip.model.transformer import ALL, Block, Keys, Transformer
from leanclip.model.vit import VisionTransformer, masked_mean
from leanclip.preprocess.patches import Patches
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
        width, eps = config.transformer_width, config.transformer_norm_eps
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.text_positions, width))
        self.token_type_embedding = self.cls_emb = self.pooler = None
        if config.transformer_token_types:
            types = torch.empty(config.transformer_token_types, width)
            self.token_type_embedding = nn.Parameter(types)
        if config.transformer_class_token:
            self.cls_emb = nn.Parameter(torch.empty(width))
        post_norm = config.transformer_post_norm
        self.ln_embedding = nn.LayerNorm(width, eps) if post_norm else nn.Identity()
        self.transformer = Transformer(
            width,
            config.transformer_layers,
            config.transformer_heads,
            activation=config.activations[1],
            is_causal=config.transformer_causal,
            mlp_ratio=config.transformer_mlp_ratio,
            norm_eps=eps,
            post_norm=post_norm,
        )
        self.ln_final = nn.Identity() if post_norm else nn.LayerNorm(width, eps)
        if config.transformer_pooler:
            self.pooler = nn.Linear(width, width)
        self.text_projection = self.text_projection_hidden = self.text_projection_bias = None
        if config.transformer_projection != "none":
            inner = width
            if config.transformer_projection == "mlp":
                inner = (width + config.embed_dim) // 2
                self.text_projection_hidden = nn.Parameter(torch.empty(width, inner))
            self.text_projection = nn.Parameter(torch.empty(inner, config.embed_dim))
        if config.transformer_projection_bias:
            self.text_projection_bias = nn.Parameter(torch.zeros(config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.logit_bias = None
        if config.logit_bias:  # SigLIP's start: arXiv 2303.15343, section 3.2
            self.logit_scale = nn.Parameter(torch.tensor(math.log(10)))
            self.logit_bias = nn.Parameter(torch.tensor(-10.0))
        self._initialize_text()

    def encode_image(self, pixels: torch.Tensor | Patches) -> torch.Tensor:
        """Normalised pixels (B, 3, R, R), or patches -> raw image features (B, E)."""
        return self.visual(pixels)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids (B, L), L up to the context length -> raw text features (B, E).

        Columns of padding may be cut off: a tower that attends to them gets them back.
        """
        tokens = self._restore_padding(tokens)
        return self._read_texts(tokens, self._text_position(tokens), None)

    def encode_packed(self, tokens: torch.Tensor) -> torch.Tensor:
        """As `encode_text`, within rounding, without computing padding.

        It is `encode_text` if the tower does not end at an end token, or there is no text.
        """
        config = self.config
        ends = config.transformer_pool in ("argmax", "eos") and not config.transformer_padding_mask
        if not (config.transformer_causal and ends and len(tokens)):
            return self.encode_text(tokens)
        end = self._text_position(tokens)
        assert end is not None
        packed = packed_layout(tokens, end)
        return self._read_texts(tokens[:, : packed.mask.shape[1]], packed.end, packed)

    def forward(self, pixels: torch.Tensor | Patches, tokens: torch.Tensor) -> Features:
        """Unit features of images and texts in float32, and the scale of their cosines.

        Pixels (B, 3, R, R) or tokens (B, L) may be replaced by the unit features (B, E) of a
        locked tower.
        """
        text = tokens
        if isinstance(pixels, torch.Tensor) and pixels.dim() == 2:
            image = pixels
        else:
            image = F.normalize(self.encode_image(pixels).float(), dim=-1)
        if not tokens.is_floating_point():
            encode = self.encode_packed if self.uses_packing else self.encode_text
            text = F.normalize(encode(tokens).float(), dim=-1)
        return Features(image, text, self.logit_scale.float().exp())

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep exp(logit_scale) within [1, 100]; called after every optimiser step.

        With a bias it is free, as in SigLIP, whose published weights have more than 100.
        """
        if self.logit_bias is None:
            self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def parameter_count(self) -> int:
        """The number of values in all parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _read_texts(
        self, tokens: torch.Tensor, position: torch.Tensor | None, packed: Packed | None
    ) -> torch.Tensor:
        """Raw features (B, E) of tokens (B, L), pooled at `position` (B,), or their mean."""
        keys = self._text_keys(tokens)
        x = self.token_embedding(tokens)  # (B, L, D)
        if self.cls_emb is not None:
            x = torch.cat([x, self.cls_emb.to(x.dtype).expand(len(x), 1, -1)], dim=1)
        first = self.config.transformer_first_position
        x = x + self.positional_embedding[first : first + x.shape[1]]
        if self.token_type_embedding is not None:
            x = x + self.token_type_embedding[0]
        x = self.ln_embedding(x)
        if packed is not None:
            x = packed.pack(x)  # (T, D)
        x = self.transformer(x, position, packed, keys)  # (B, D), or (B, L, D) without a position
        if position is None:
            x = masked_mean(x, tokens != self.config.transformer_pad_id)  # (B, D)
        return self._project_text(self.ln_final(x))

    def _project_text(self, x: torch.Tensor) -> torch.Tensor:
        """Pooled features (B, D) -> (B, E)."""
        if self.pooler is not None:
            x = torch.tanh(self.pooler(x))
        if self.text_projection_hidden is not None:
            x = F.gelu(x @ self.text_projection_hidden)
        if self.text_projection is not None:
            x = x @ self.text_projection
        return x if self.text_projection_bias is None else x + self.text_projection_bias

    def _text_keys(self, tokens: torch.Tensor) -> Keys:
        """Which tokens (B, L) are attended to."""
        if self.config.transformer_padding_mask:
            return Keys(tokens != self.config.transformer_pad_id)
        if self.cls_emb is not None:
            # As CoCa was trained: the mask is one place late, so that the class token attends to
            # the first padding, and to itself only where there is none.
            return Keys(F.pad(tokens != self.config.transformer_pad_id, (1, 0), value=True))
        return ALL

    def _restore_padding(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L) padded to the context length, if the tower attends beyond the end token."""
        config = self.config
        if config.transformer_padding_mask:
            return tokens
        if config.transformer_causal and config.transformer_pool != "last":
            return tokens
        missing = max(0, self.context_length - tokens.shape[1])
        return F.pad(tokens, (0, missing), value=config.transformer_pad_id)  # (B, L)

    def _text_position(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """The position that is pooled in each row of tokens (B, L): (B,); None: their mean."""
        match self.config.transformer_pool:
            case "argmax":
                return tokens.argmax(dim=-1)
            case "first":
                return torch.zeros_like(tokens[:, 0])
            case "eos":
                return (tokens == self.config.transformer_eos_id).int().argmax(dim=-1)
            case "last":
                last = tokens.shape[1] - (self.cls_emb is None)
                return torch.full_like(tokens[:, 0], last)
            case "mean":
                return None

    def _initialize_text(self) -> None:
        """OpenAI's initialisation of the text tower; the vision towers initialise themselves."""
        width, layers = self.config.transformer_width, self.config.transformer_layers
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for embedding in (self.token_type_embedding, self.cls_emb):
            if embedding is not None:
                nn.init.normal_(embedding, std=0.01)
        for projection in (self.text_projection_hidden, self.text_projection):
            if projection is not None:
                nn.init.normal_(projection, std=len(projection) ** -0.5)
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
    return VisionTransformer(config)
