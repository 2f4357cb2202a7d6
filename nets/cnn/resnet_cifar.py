"""ResNets for 32x32 images with parameter-free shortcuts (He et al., CVPR 2016, section 4.2)."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ._base import Manifold, ZooModel, conv, kaiming_fan_out_, on_manifold

__all__ = ["CifarResNet", "resnet8", "resnet20", "resnet32", "resnet44", "resnet56"]


class PadShortcut(nn.Module):
    """Option A: every second pixel, new channels zero."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        missing = out_channels - in_channels
        self.before, self.after = missing // 2, missing - missing // 2

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, out_channels, ceil(H / 2), ceil(W / 2))."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class PlainBlock(nn.Module):
    """Two 3x3 convolutions, each followed by BatchNorm."""

    scale_invariant: ClassVar[tuple[str, ...]] = ("conv1", "conv2")

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity() if stride == 1 else PadShortcut(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(ZooModel):
    """Depth 6n + 2: a stem, three stages of n blocks with 16, 32 and 64 channels, pooling, one linear layer.

    Convolutions are initialised by He's normal rule with fan-out.

    Args:
        blocks: n, the number of blocks a stage.
        num_classes: outputs.
        in_channels: channels of the input.
    """

    scale_invariant: ClassVar[tuple[str, ...]] = ("conv1",)

    def __init__(self, blocks: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, 16, 3)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks, 16, 16, stride=1)
        self.layer2 = _stage(blocks, 16, 32, stride=2)
        self.layer3 = _stage(blocks, 32, 64, stride=2)
        self.fc = nn.Linear(64, num_classes)
        kaiming_fan_out_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, H, W), 32x32 in the paper, to logits (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def _stage(blocks: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    first = PlainBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(PlainBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def resnet8(num_classes: int = 10, in_channels: int = 3, manifold: Manifold = None) -> CifarResNet:
    """ResNet-8, one block a stage: 75,290 parameters; smaller than the published ones."""
    return on_manifold(CifarResNet(1, num_classes, in_channels), manifold)


def resnet20(num_classes: int = 10, in_channels: int = 3, manifold: Manifold = None) -> CifarResNet:
    """ResNet-20: 269,722 parameters (published: 0.27M)."""
    return on_manifold(CifarResNet(3, num_classes, in_channels), manifold)


def resnet32(num_classes: int = 10, in_channels: int = 3, manifold: Manifold = None) -> CifarResNet:
    """ResNet-32: 464,154 parameters (published: 0.46M)."""
    return on_manifold(CifarResNet(5, num_classes, in_channels), manifold)


def resnet44(num_classes: int = 10, in_channels: int = 3, manifold: Manifold = None) -> CifarResNet:
    """ResNet-44: 658,586 parameters (published: 0.66M)."""
    return on_manifold(CifarResNet(7, num_classes, in_channels), manifold)


def resnet56(num_classes: int = 10, in_channels: int = 3, manifold: Manifold = None) -> CifarResNet:
    """ResNet-56: 853,018 parameters (published: 0.85M)."""
    return on_manifold(CifarResNet(9, num_classes, in_channels), manifold)
