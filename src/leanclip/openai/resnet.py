"""The ResNet tower with the modules of OpenAI's package; `leanclip.model.resnet` describes it.

Activations and pools are modules here, for hooks, and the attention pool may be replaced.

Shapes: B batch, W stem width, C = 32 W channels, h = w positions a side, E embedding, H heads.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["AttentionPool2d", "Bottleneck", "ModifiedResNet"]


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a residual; a stride is an average pool."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        outer = planes * self.expansion
        self.stride = stride
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu2 = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, outer, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outer)
        self.relu3 = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride > 1 or inplanes != outer:
            convolution = nn.Conv2d(inplanes, outer, 1, bias=False)
            parts = {"-1": nn.AvgPool2d(stride), "0": convolution, "1": nn.BatchNorm2d(outer)}
            self.downsample = nn.Sequential(OrderedDict(parts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inplanes, h, w) -> (B, 4 planes, h / stride, w / stride)."""
        y = self.relu1(self.bn1(self.conv1(x)))  # (B, planes, h, w)
        y = self.avgpool(self.relu2(self.bn2(self.conv2(y))))  # (B, planes, h/stride, w/stride)
        y = self.bn3(self.conv3(y))  # (B, 4 planes, h/stride, w/stride)
        return self.relu3(y + (x if self.downsample is None else self.downsample(x)))


class AttentionPool2d(nn.Module):
    """Attention over the positions of an image and their mean, with the mean as the query."""

    def __init__(
        self, spacial_dim: int, embed_dim: int, num_heads: int, output_dim: int | None = None
    ) -> None:
        super().__init__()
        positions = torch.empty(spacial_dim**2 + 1, embed_dim).normal_()
        self.positional_embedding = nn.Parameter(positions / embed_dim**0.5)
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.c_proj = nn.Linear(embed_dim, output_dim or embed_dim)
        self.num_heads = num_heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, E)."""
        x = x.flatten(2).transpose(1, 2)  # (B, hw, C)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)  # (B, hw+1, C)
        x = x + self.positional_embedding.to(x.dtype)
        q = self._split_heads(self.q_proj(x[:, :1]))  # (B, H, 1, C/H)
        k = self._split_heads(self.k_proj(x))  # (B, H, hw+1, C/H)
        v = self._split_heads(self.v_proj(x))  # (B, H, hw+1, C/H)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, H, 1, C/H)
        return self.c_proj(x.flatten(1))  # (B, E)

    def _split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, C) -> (B, H, L, C/H)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class ModifiedResNet(nn.Module):
    """ResNet with an attention pool.

    Args:
        layers: bottlenecks of each of the four stages.
        output_dim: E.
        heads: heads of the attention pool.
        input_resolution: side of the square image, in pixels.
        width: W.
    """

    def __init__(
        self,
        layers: Sequence[int],
        output_dim: int,
        heads: int,
        input_resolution: int = 224,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.output_dim, self.input_resolution = output_dim, input_resolution
        half = width // 2
        self.conv1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(half, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu3 = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(2)
        self.layer1 = _stage(width, width, layers[0], 1)
        self.layer2 = _stage(4 * width, 2 * width, layers[1], 2)
        self.layer3 = _stage(8 * width, 4 * width, layers[2], 2)
        self.layer4 = _stage(16 * width, 8 * width, layers[3], 2)
        self.attnpool = AttentionPool2d(input_resolution // 32, 32 * width, heads, output_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (B, 3, R, R) -> features (B, E), not normalised."""
        x = x.to(self.conv1.weight.dtype)
        x = self.relu1(self.bn1(self.conv1(x)))  # (B, W/2, R/2, R/2)
        x = self.relu2(self.bn2(self.conv2(x)))
        x = self.relu3(self.bn3(self.conv3(x)))  # (B, W, R/2, R/2)
        x = self.avgpool(x)  # (B, W, R/4, R/4)
        x = self.layer1(x)  # (B, 4W, R/4, R/4)
        x = self.layer2(x)  # (B, 8W, R/8, R/8)
        x = self.layer3(x)  # (B, 16W, R/16, R/16)
        x = self.layer4(x)  # (B, 32W, R/32, R/32)
        return self.attnpool(x)  # (B, E)

    def initialize_parameters(self) -> None:
        """Initialise the attention pool; every bottleneck starts as its shortcut."""
        if isinstance(self.attnpool, AttentionPool2d):
            pool, std = self.attnpool, self.attnpool.c_proj.in_features**-0.5
            for projection in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
                nn.init.normal_(projection.weight, std=std)
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)


def _stage(inplanes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    """`blocks` bottlenecks, of which the first strides."""
    outer = planes * Bottleneck.expansion
    first = Bottleneck(inplanes, planes, stride)
    return nn.Sequential(first, *(Bottleneck(outer, planes) for _ in range(blocks - 1)))
