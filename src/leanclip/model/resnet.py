"""The ResNet tower of CLIP: normalised pixels -> image features.

    pixels -> three-convolution stem -> four stages of bottlenecks -> attention pool

A ResNet-D (arXiv 1812.01187) that averages before it strides, with an attention pool in place of
the global average (arXiv 2103.00020, section 2.4). Parameter names are OpenAI's.

Shapes: B batch, R resolution, W stem width, C = 32 W channels, h = w = R / 32, E embedding,
H heads.
"""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F


class ModifiedResNet(nn.Module):
    """ResNet with an attention pool, as in OpenAI's CLIP.

    Args:
        input_resolution: side of the square image, in pixels; a multiple of 32.
        layers: bottlenecks of each of the four stages; (3, 4, 6, 3) for RN50.
        width: W, channels after the stem; even, 64 for RN50.
        heads: heads of the attention pool; OpenAI's models have W / 2.
        output_dim: E.
    """

    def __init__(
        self,
        *,
        input_resolution: int,
        layers: tuple[int, int, int, int],
        width: int,
        heads: int,
        output_dim: int,
    ) -> None:
        super().__init__()
        self.input_resolution = input_resolution
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, layers[0], stride=1)
        self.layer2 = _stage(4 * width, 2 * width, layers[1], stride=2)
        self.layer3 = _stage(8 * width, 4 * width, layers[2], stride=2)
        self.layer4 = _stage(16 * width, 8 * width, layers[3], stride=2)
        self.attnpool = AttentionPool2d(input_resolution // 32, 32 * width, heads, output_dim)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (B, 3, R, R) -> features (B, E), not normalised."""
        return self.attnpool(self.trunk(pixels))

    def trunk(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (B, 3, R, R) -> the last stage's output (B, C, h, w)."""
        x = F.relu(self.bn1(self.conv1(pixels)))  # (B, W/2, R/2, R/2)
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))  # (B, W, R/2, R/2)
        x = F.avg_pool2d(x, 2)  # (B, W, R/4, R/4)
        x = self.layer1(x)  # (B, 4W, R/4, R/4)
        x = self.layer2(x)  # (B, 8W, R/8, R/8)
        x = self.layer3(x)  # (B, 16W, R/16, R/16)
        return self.layer4(x)  # (B, 32W, R/32, R/32)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a residual; strides are average pools.

    The last BatchNorm starts at zero, so that a block starts as its shortcut.
    """

    def __init__(self, channels: int, inner: int, *, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, 4 * inner, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * inner)
        nn.init.zeros_(self.bn3.weight)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or channels != 4 * inner:
            convolution = nn.Conv2d(channels, 4 * inner, 1, bias=False)
            parts = {"-1": nn.AvgPool2d(stride), "0": convolution, "1": nn.BatchNorm2d(4 * inner)}
            self.downsample = nn.Sequential(OrderedDict(parts))  # OpenAI's names

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, channels, h, w) -> (B, 4 inner, h / stride, w / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))  # (B, inner, h, w)
        y = F.relu(self.bn2(self.conv2(y)))
        if self.stride > 1:
            y = F.avg_pool2d(y, self.stride)  # (B, inner, h/stride, w/stride)
        y = self.bn3(self.conv3(y))  # (B, 4 inner, h/stride, w/stride)
        return F.relu(y + self.downsample(x))


class AttentionPool2d(nn.Module):
    """Attention over the positions and their mean, with the mean as the only query.

    Equal to OpenAI's F.multi_head_attention_forward, which computes all queries.
    """

    def __init__(self, side: int, width: int, heads: int, output_dim: int) -> None:
        super().__init__()
        self.heads = heads
        positions = torch.empty(side**2 + 1, width).normal_(std=width**-0.5)
        self.positional_embedding = nn.Parameter(positions)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, output_dim)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(projection.weight, std=width**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, E)."""
        x = x.flatten(2).transpose(1, 2)  # (B, hw, C)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)  # (B, hw+1, C)
        x = x + self.positional_embedding
        q = self._split_heads(self.q_proj(x[:, :1]))  # (B, H, 1, C/H)
        k = self._split_heads(self.k_proj(x))  # (B, H, hw+1, C/H)
        v = self._split_heads(self.v_proj(x))  # (B, H, hw+1, C/H)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, H, 1, C/H)
        return self.c_proj(x.flatten(1))  # (B, E)

    def _split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, C) -> (B, H, L, C/H)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _stage(channels: int, inner: int, blocks: int, *, stride: int) -> nn.Sequential:
    """`blocks` bottlenecks, the first with the stride: `channels` in, 4 * `inner` out."""
    return nn.Sequential(
        Bottleneck(channels, inner, stride=stride),
        *(Bottleneck(4 * inner, inner, stride=1) for _ in range(blocks - 1)),
    )
