"""The names of OpenAI's `clip.model`, also those that its `import *` brings along."""

from collections import OrderedDict
from typing import Tuple, Union  # noqa: UP035

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

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
    "F",
    "LayerNorm",
    "ModifiedResNet",
    "OrderedDict",
    "QuickGELU",
    "ResidualAttentionBlock",
    "Transformer",
    "Tuple",
    "Union",
    "VisionTransformer",
    "build_model",
    "convert_weights",
    "nn",
    "np",
    "torch",
]
