"""The section `model`: the architecture."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from leanclip.config.sections import PositiveFloat, Ratio, Section, Size

Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]

_VIT_ONLY = (  # of a ResNet they must have their defaults
    "vision_patch_size",
    "vision_mlp_ratio",
    "vision_activation",
    "vision_norm_eps",
    "vision_class_token",
    "vision_pool",
    "vision_pool_heads",
    "vision_pool_mlp_ratio",
    "vision_pool_queries",
    "vision_norm_after_pool",
    "vision_positions",
    "vision_rotary_grid",
    "vision_projection",
    "vision_projection_bias",
    "vision_layer_scale",
    "pre_norm",
    "patch_bias",
)

_EXTENSIONS = (  # of families after CLIP
    *("vision_norm_eps", "vision_class_token", "vision_pool_heads", "vision_pool_mlp_ratio"),
    *("vision_pool_queries", "vision_positions", "vision_projection", "vision_projection_bias"),
    *("vision_layer_scale", "transformer_norm_eps", "transformer_padding_mask"),
    *("transformer_post_norm", "transformer_token_types", "transformer_pooler"),
    *("transformer_positions", "transformer_first_position", "transformer_class_token"),
    *("transformer_projection", "transformer_projection_bias"),
)


class ModelConfig(Section):
    """The architecture, in the keys of OpenAI's code and of PASSL's `arch` dict."""

    embed_dim: Size = Field(description="width of the shared feature space")
    image_resolution: Size = Field(description="side of the square input image, in pixels")
    vision_layers: int | tuple[int, int, int, int] = Field(
        description="a number: blocks of a ViT; four: bottlenecks of a ResNet's stages"
    )
    vision_width: Size = Field(
        description="width of the vision tower; of a ResNet: channels after the stem"
    )
    vision_patch_size: Size | None = Field(
        default=None, description="side of a ViT's patch, in pixels; of a ResNet: null or 0"
    )
    vision_heads: Size | None = Field(
        default=None,
        description="attention heads of the vision tower; of a ResNet: of its attention pool; "
        "null: OpenAI's, 64 channels each",
    )
    vision_mlp_ratio: Ratio = Field(
        default=4.0, description="hidden width of a ViT's perceptrons / vision_width, rounded down"
    )
    vision_activation: Activation | None = Field(
        default=None, description="of a ViT's perceptrons; null: that of `activation`"
    )
    vision_norm_eps: PositiveFloat = Field(default=1e-5, description="of a ViT's LayerNorms")
    vision_class_token: bool = Field(
        default=True, description="a class token before a ViT's patches; SigLIP's has none"
    )
    vision_pool: Literal["tok", "avg", "attn", "queries"] = Field(
        default="tok",
        description="pooling of a ViT: the class token, the mean of the patches, attention of a "
        "learned query with an MLP (SigLIP, PE-Core), or of several (CoCa)",
    )
    vision_pool_heads: Size | None = Field(
        default=None,
        description="attention heads of vision_pool attn or queries; null: the tower's",
    )
    vision_pool_mlp_ratio: Ratio | None = Field(
        default=None, description="hidden width of vision_pool attn's MLP; null: vision_mlp_ratio"
    )
    vision_pool_queries: Size | None = Field(
        default=None, description="with vision_pool queries: their number, of which one is read"
    )
    vision_norm_after_pool: bool = Field(
        default=False, description="with vision_pool avg: the last LayerNorm follows the mean"
    )
    vision_positions: Literal["learned", "resized", "rotary"] = Field(
        default="learned",
        description="positions of a ViT's patches; resized: a learned grid, resized to the patches "
        "of each image (NaFlex); rotary: in two dimensions, beside learned ones (PE-Core)",
    )
    vision_rotary_grid: Size | None = Field(
        default=None,
        description="with vision_positions rotary: patches a side that the positions are scaled "
        "to; null: those of the image",
    )
    vision_projection: Literal["linear", "none"] = Field(
        default="linear", description="of a ViT's pooled features to embed_dim"
    )
    vision_projection_bias: bool = Field(default=False, description="a bias in that projection")
    vision_layer_scale: PositiveFloat | None = Field(
        default=None, description="initial factor of each residual branch of a ViT; null: none"
    )
    context_length: Size = Field(default=77, description="tokens of a caption, with start and end")
    vocab_size: Size = Field(default=49408, description="number of token ids")
    transformer_width: Size = Field(description="width of the text tower")
    transformer_heads: Size = Field(description="attention heads of the text tower")
    transformer_layers: Annotated[int, Field(gt=0, le=1000)] = Field(
        description="blocks of the text tower"
    )
    transformer_mlp_ratio: Ratio = Field(
        default=4.0,
        description="hidden width of the text tower's perceptrons / its width, rounded down",
    )
    transformer_activation: Activation | None = Field(
        default=None, description="of the text tower's perceptrons; null: that of `activation`"
    )
    transformer_norm_eps: PositiveFloat = Field(
        default=1e-5, description="of the text tower's LayerNorms"
    )
    transformer_pool: Literal["argmax", "first", "last", "eos", "mean"] = Field(
        default="argmax",
        description="pooling of the text: the token with the highest id (the end token), the "
        "first, the last of the padded context, the first that is transformer_eos_id, or the mean "
        "of those that are not padding",
    )
    transformer_eos_id: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="with transformer_pool eos: the end token's id; a text without it is pooled at "
        "its first token, as in transformers and open_clip",
    )
    transformer_causal: bool = Field(default=True, description="causal attention in the text tower")
    transformer_pad_id: Annotated[int, Field(ge=0)] = Field(
        default=0, description="token id of padding"
    )
    transformer_padding_mask: bool = Field(
        default=False, description="padding is not attended to (BERT); else it is, if not causal"
    )
    transformer_post_norm: bool = Field(
        default=False,
        description="BERT's order: LayerNorm of the embeddings and after each residual, none at "
        "the end",
    )
    transformer_token_types: Annotated[int, Field(ge=0, le=1000)] = Field(
        default=0, description="rows of BERT's table of token types, of which the first is added"
    )
    transformer_pooler: bool = Field(
        default=False, description="BERT's pooler (linear and tanh) after the pooling"
    )
    transformer_positions: Size | None = Field(
        default=None, description="rows of the text's table of positions; null: as many as it uses"
    )
    transformer_first_position: Annotated[int, Field(ge=0, le=1000)] = Field(
        default=0, description="position of the first token; RoBERTa's: its padding id + 1"
    )
    transformer_class_token: bool = Field(
        default=False, description="a learned token after the context that is pooled (CoCa)"
    )
    transformer_projection: Literal["linear", "none", "mlp"] = Field(
        default="linear", description="of the text's pooled features to embed_dim"
    )
    transformer_projection_bias: bool = Field(
        default=False, description="a bias in a linear projection of the text (SigLIP)"
    )
    activation: Activation = Field(
        default="quick_gelu",
        description="of both towers' perceptrons; OpenAI's: quick_gelu",
    )
    pre_norm: bool = Field(default=True, description="LayerNorm before a ViT's first block")
    patch_bias: bool = Field(default=False, description="a bias in a ViT's patch embedding")
    logit_bias: bool = Field(
        default=False, description="a bias on the logits, for the loss siglip; starts at -10"
    )

    @property
    def attention_heads(self) -> int:
        """Heads of the vision tower: `vision_heads`, else 64 channels each."""
        return self.vision_heads or self._attention_width // 64

    @property
    def pool_heads(self) -> int:
        """Heads of a ViT's attention pool."""
        return self.vision_pool_heads or self.attention_heads

    @property
    def activations(self) -> tuple[Activation, Activation]:
        """Of the vision and the text tower."""
        return (
            self.vision_activation or self.activation,
            self.transformer_activation or self.activation,
        )

    @property
    def extensions(self) -> list[str]:
        """The settings in use that OpenAI's code and those who share its form have nothing for."""
        fields = type(self).model_fields
        found = [name for name in _EXTENSIONS if getattr(self, name) != fields[name].default]
        pools = {"vision_pool": ("attn", "queries"), "transformer_pool": ("mean",)}
        found += [name for name, newer in pools.items() if getattr(self, name) in newer]
        if len({*self.activations}) > 1:
            found += ["vision_activation", "transformer_activation"]
        return found

    @property
    def text_positions(self) -> int:
        """Rows of the text's table of positions."""
        return self.transformer_positions or self._used_positions

    @property
    def _used_positions(self) -> int:
        return self.transformer_first_position + self.context_length + self.transformer_class_token

    @property
    def _attention_width(self) -> int:
        """Width of the vision tower's attention; a ResNet's last stage has 32 W channels."""
        return self.vision_width * (1 if isinstance(self.vision_layers, int) else 32)

    @model_validator(mode="before")
    @classmethod
    def _from_passl(cls, values: Any) -> Any:
        """Accept PASSL's `model:` block or `arch` dict, without the keys that are constant here."""
        if not isinstance(values, dict):
            return values
        if isinstance(values.get("architecture"), dict):
            wrapper = {"architecture", "head", "name"}
            outer = {key: value for key, value in values.items() if key not in wrapper}
            values = values["architecture"] | outer
        fixed = {"name": "CLIP", "qkv_bias": True, "proj": True}
        for key in fixed.keys() & values.keys():
            if values[key] != fixed[key]:
                raise ValueError(f"{key}: {values[key]} is not supported, only {fixed[key]}")
        values = {key: value for key, value in values.items() if key not in fixed}
        if isinstance(values.get("vision_layers"), list) and values.get("vision_patch_size") == 0:
            values["vision_patch_size"] = None  # PASSL's ResNets
        return values

    @field_validator("vision_layers", mode="before")
    @classmethod
    def _one_or_four(cls, value: Any) -> Any:
        """Turn a list into a tuple; one message in place of one per type of the union."""
        is_list = isinstance(value, list | tuple)
        numbers = tuple(value) if is_list else (value,)
        are_counts = all(type(number) is int and 0 < number <= 1000 for number in numbers)
        if not are_counts or len(numbers) != (4 if is_list else 1):
            found = json.dumps(value, ensure_ascii=False)[:60]
            raise ValueError(f"should be one number (a ViT) or four (a ResNet), found {found}")
        return numbers if is_list else value

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if isinstance(self.vision_layers, int):
            self._check_vit()
        else:
            self._check_resnet()
        self._check_text()
        for tower in ("vision", "transformer"):
            width, ratio = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_mlp_ratio")
            if int(width * ratio) < 1:
                raise ValueError(f"{tower}_mlp_ratio {ratio} of {width} leaves no hidden width")
        return self

    def _check_vit(self) -> None:
        if self.vision_patch_size is None:
            raise ValueError("vision_patch_size is required with a ViT, and not set")
        if self.image_resolution < self.vision_patch_size:
            raise ValueError(
                f"image_resolution {self.image_resolution} is less than vision_patch_size "
                f"{self.vision_patch_size}"
            )
        _check_multiple("vision_width", self.vision_width, "vision_heads", self.attention_heads)
        if self.vision_pool == "tok" and not self.vision_class_token:
            raise ValueError("vision_pool tok needs vision_class_token; set avg or attn")
        if (self.vision_pool == "queries") != (self.vision_pool_queries is not None):
            raise ValueError("vision_pool_queries goes with vision_pool queries, and only with it")
        if self.vision_pool == "attn":
            _check_multiple("vision_width", self.vision_width, "vision_pool_heads", self.pool_heads)
        if self.vision_pool == "queries":
            _check_multiple("embed_dim", self.embed_dim, "vision_pool_heads", self.pool_heads)
        if self.vision_positions == "resized" and self.vision_class_token:
            raise ValueError("vision_positions resized goes with vision_class_token false")
        if self.vision_rotary_grid is not None and self.vision_positions != "rotary":
            raise ValueError("vision_rotary_grid goes with vision_positions rotary")
        if self.vision_positions == "rotary":
            head = self.vision_width // self.attention_heads
            _check_multiple("width of a head", head, "rotary positions'", 4)
        if self.vision_projection == "none" and self.vision_width != self.embed_dim:
            raise ValueError(
                f"vision_projection none: vision_width {self.vision_width} is not embed_dim "
                f"{self.embed_dim}"
            )

    def _check_resnet(self) -> None:
        for name in _VIT_ONLY:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} {getattr(self, name)} does not go with a ResNet")
        # it halves the side five times, and its stem starts with half of the width
        _check_multiple("image_resolution", self.image_resolution, "a ResNet's", 32)
        _check_multiple("vision_width", self.vision_width, "a ResNet's", 2)
        width, heads = self._attention_width, self.attention_heads
        _check_multiple("32 * vision_width", width, "vision_heads", heads)

    def _check_text(self) -> None:
        if (self.transformer_pool == "eos") != (self.transformer_eos_id is not None):
            raise ValueError("transformer_eos_id goes with transformer_pool eos, and only with it")
        width, heads = self.transformer_width, self.transformer_heads
        _check_multiple("transformer_width", width, "transformer_heads", heads)
        if self.transformer_class_token and self.transformer_pool != "last":
            raise ValueError("transformer_class_token goes with transformer_pool last")
        if self.text_positions < self._used_positions:
            raise ValueError(
                f"transformer_positions {self.text_positions}: the context needs "
                f"{self._used_positions}"
            )
        if self.transformer_projection == "none" and width != self.embed_dim:
            raise ValueError(
                f"transformer_projection none: transformer_width {width} is not embed_dim "
                f"{self.embed_dim}"
            )


def _check_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if divisor == 0 or value % divisor:
        raise ValueError(f"{name} {value} is not a multiple of {divisor_name} {divisor}")
