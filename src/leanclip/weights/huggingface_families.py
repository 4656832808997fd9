"""Hugging Face's families of dual encoders as data: names, settings, defaults.

A family is the names of its tensors, the settings that all its models have, and the defaults of
what a config.json leaves out. Published ones are terse, SigLIP's above all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from leanclip.weights.names import Rule, bert_rules

_LAYERS = (  # of a tower with LayerNorms before attention and MLP
    ("ln_1.*", "layer_norm1.*"),
    ("ln_2.*", "layer_norm2.*"),
    ("mlp.c_fc.*", "mlp.fc1.*"),
    ("mlp.c_proj.*", "mlp.fc2.*"),
    ("attn.out_proj.*", "self_attn.out_proj.*"),
    ("attn.in_proj_*", "self_attn.{q,k,v}_proj.*"),
)


def _blocks(ours: str, theirs: str, layers: tuple[tuple[str, str], ...]) -> tuple[Rule, ...]:
    return tuple(Rule(f"{ours}.resblocks.*.{a}", f"{theirs}.*.{b}") for a, b in layers)


_EMBEDDINGS = "vision_model.embeddings"
_VISION = (
    Rule("visual.positional_embedding", f"{_EMBEDDINGS}.position_embedding.weight"),
    Rule("visual.ln_post.*", "vision_model.post_layernorm.*"),
    *_blocks("visual.transformer", "vision_model.encoder.layers", _LAYERS),
)
_CLIP_VISION = (
    Rule("logit_scale", "logit_scale"),
    Rule("visual.class_embedding", f"{_EMBEDDINGS}.class_embedding"),
    Rule("visual.conv1.weight", f"{_EMBEDDINGS}.patch_embedding.weight"),
    Rule("visual.ln_pre.*", "vision_model.pre_layrnorm.*"),
    Rule("visual.proj", "visual_projection.weight", transpose=True),
    Rule("text_projection", "text_projection.weight", transpose=True),
    *_VISION,
)
_TEXT = (
    Rule("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    Rule("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    Rule("ln_final.*", "text_model.final_layer_norm.*"),
    *_blocks("transformer", "text_model.encoder.layers", _LAYERS),
)
_BERT = bert_rules("text_model")
_HEAD = "vision_model.head"
_SIGLIP = (
    Rule("logit_scale", "logit_scale", leading=1),
    Rule("logit_bias", "logit_bias", leading=1),
    Rule("visual.conv1.bias", f"{_EMBEDDINGS}.patch_embedding.bias"),
    Rule("visual.attn_pool.probe", f"{_HEAD}.probe"),
    Rule("visual.attn_pool.attn.**", f"{_HEAD}.attention.**"),
    Rule("visual.attn_pool.layernorm.*", f"{_HEAD}.layernorm.*"),
    Rule("visual.attn_pool.mlp.c_fc.*", f"{_HEAD}.mlp.fc1.*"),
    Rule("visual.attn_pool.mlp.c_proj.*", f"{_HEAD}.mlp.fc2.*"),
    Rule("text_projection", "text_model.head.weight", transpose=True),
    Rule("text_projection_bias", "text_model.head.bias"),
    *_VISION,
    *_TEXT,
)
_SIGLIP_HEADS = {768: 12, 1024: 16, 1152: 16, 1536: 16}
_CONV = Rule("visual.conv1.weight", f"{_EMBEDDINGS}.patch_embedding.weight")
_LINEAR = Rule(_CONV.ours, _CONV.theirs, patches=True)


@dataclass(frozen=True)
class Family:
    """What the models of one `model_type` have in common."""

    model_type: str
    model: str  # the class in transformers
    processor: str
    image_processor: str
    rules: tuple[Rule, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)  # beside ModelConfig's defaults
    vision: Mapping[str, Any] = field(default_factory=dict)  # transformers' defaults of the section
    text: Mapping[str, Any] = field(default_factory=dict)
    # Of the published widths; without them tensors alone do not determine an architecture.
    vision_heads: Mapping[int, int] = field(default_factory=dict)
    text_heads: Mapping[int, int] = field(default_factory=dict)


_BASE = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
_VISION_DEFAULTS = _BASE | {
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_TEXT_DEFAULTS = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
_SIGLIP_DEFAULTS = _BASE | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_SIGLIP_TEXT = _SIGLIP_DEFAULTS | {
    "max_position_embeddings": 64,
    "vocab_size": 32000,
    "pad_token_id": 1,
}
_SIGLIP_SETTINGS = {
    "vision_class_token": False,
    "vision_pool": "attn",
    "vision_projection": "none",
    "pre_norm": False,
    "patch_bias": True,
    "transformer_causal": False,
    "transformer_pool": "last",
    "transformer_projection_bias": True,
    "logit_bias": True,
}

CLIP = Family(
    model_type="clip",
    model="CLIPModel",
    processor="CLIPProcessor",
    image_processor="CLIPImageProcessor",
    rules=(*_CLIP_VISION, *_TEXT),
    vision=_VISION_DEFAULTS,
    text=_TEXT_DEFAULTS,
)
METACLIP_2 = Family(
    model_type="metaclip_2",
    model="MetaClip2Model",
    processor="CLIPProcessor",
    image_processor="CLIPImageProcessor",
    rules=CLIP.rules,
    settings={"transformer_pool": "eos"},
    vision=_VISION_DEFAULTS,
    text=_TEXT_DEFAULTS | {"pad_token_id": 1},
)
SIGLIP = Family(
    model_type="siglip",
    model="SiglipModel",
    processor="SiglipProcessor",
    image_processor="SiglipImageProcessor",
    rules=(_CONV, *_SIGLIP),
    settings=_SIGLIP_SETTINGS,
    vision=_SIGLIP_DEFAULTS | {"image_size": 224, "patch_size": 16},
    text=_SIGLIP_TEXT,
    vision_heads=_SIGLIP_HEADS,
    text_heads=_SIGLIP_HEADS,
)
NAFLEX = Family(
    model_type="siglip2",
    model="Siglip2Model",
    processor="Siglip2Processor",
    image_processor="Siglip2ImageProcessor",
    rules=(_LINEAR, *_SIGLIP),
    settings=_SIGLIP_SETTINGS | {"vision_positions": "resized"},
    vision=_SIGLIP_DEFAULTS | {"num_patches": 256, "patch_size": 16},
    text=_SIGLIP_TEXT,
    vision_heads=_SIGLIP_HEADS,
    text_heads=_SIGLIP_HEADS,
)
CHINESE_CLIP = Family(
    model_type="chinese_clip",
    model="ChineseCLIPModel",
    processor="ChineseCLIPProcessor",
    image_processor="ChineseCLIPImageProcessor",
    rules=(*_CLIP_VISION, *_BERT),
    settings={
        "transformer_causal": False,
        "transformer_pool": "first",
        "transformer_post_norm": True,
        "transformer_padding_mask": True,
    },
    vision=_VISION_DEFAULTS,
    text=_BASE
    | {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "vocab_size": 30522,
        "pad_token_id": 0,
        "type_vocab_size": 2,
    },
    vision_heads={768: 12, 1024: 16, 1280: 16},
    text_heads={768: 12, 1024: 16},
)
FAMILIES = {one.model_type: one for one in (CLIP, METACLIP_2, SIGLIP, NAFLEX, CHINESE_CLIP)}
