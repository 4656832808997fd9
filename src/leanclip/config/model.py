"""The section `model`: the architecture."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from leanclip.config.sections import Ratio, Section, Size

Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]

_VIT_ONLY = (  # of a ResNet they must have their defaults
    "vision_patch_size",
    "vision_mlp_ratio",
    "vision_pool",
    "vision_norm_after_pool",
    "pre_norm",
    "patch_bias",
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
    vision_pool: Literal["tok", "avg"] = Field(
        default="tok", description="pooling of a ViT: the class token, or the mean of the patches"
    )
    vision_norm_after_pool: bool = Field(
        default=False, description="with vision_pool avg: the last LayerNorm follows the mean"
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
    transformer_pool: Literal["argmax", "first", "last", "eos"] = Field(
        default="argmax",
        description="pooling of the text: the token with the highest id (the end token), the "
        "first, the last of the padded context, or the first that is transformer_eos_id",
    )
    transformer_eos_id: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="with transformer_pool eos: the end token's id; a text without it is pooled at "
        "its first token, as in transformers and open_clip",
    )
    transformer_causal: bool = Field(default=True, description="causal attention in the text tower")
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
        if (self.transformer_pool == "eos") != (self.transformer_eos_id is not None):
            raise ValueError("transformer_eos_id goes with transformer_pool eos, and only with it")
        side, heads = self.image_resolution, self.attention_heads
        text_width, text_heads = self.transformer_width, self.transformer_heads
        checks: list[tuple[str, int, str, int]] = [
            ("transformer_width", text_width, "transformer_heads", text_heads)
        ]
        if isinstance(self.vision_layers, int):
            if self.vision_patch_size is None:
                raise ValueError("vision_patch_size is required with a ViT, and not set")
            checks += [
                ("image_resolution", side, "vision_patch_size", self.vision_patch_size),
                ("vision_width", self.vision_width, "vision_heads", heads),
            ]
        else:
            for name in _VIT_ONLY:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} {getattr(self, name)} does not go with a ResNet")
            checks += [
                ("image_resolution", side, "a ResNet's", 32),  # it halves the side five times
                ("vision_width", self.vision_width, "a ResNet's", 2),  # its stem starts with half
                ("32 * vision_width", self._attention_width, "vision_heads", heads),
            ]
        for name, value, divisor_name, divisor in checks:
            if divisor == 0 or value % divisor:
                raise ValueError(f"{name} {value} is not a multiple of {divisor_name} {divisor}")
        for tower in ("vision", "transformer"):
            width, ratio = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_mlp_ratio")
            if int(width * ratio) < 1:
                raise ValueError(f"{tower}_mlp_ratio {ratio} of {width} leaves no hidden width")
        return self
