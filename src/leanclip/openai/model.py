"""The names of OpenAI's `clip.model`."""

from leanclip.openai.network import (
    CLIP,
    LayerNorm,
    QuickGELU,
    ResidualAttentionBlock,
    Transformer,
    VisionTransformer,
    build_model,
    convert_weights,
)
from leanclip.openai.resnet import AttentionPool2d, Bottleneck, ModifiedResNet

__all__ = [
    "CLIP",
    "AttentionPool2d",
    "Bottleneck",
    "LayerNorm",
    "ModifiedResNet",
    "QuickGELU",
    "ResidualAttentionBlock",
    "Transformer",
    "VisionTransformer",
    "build_model",
    "convert_weights",
]
