"""ResNet-18, 34 and 50 (He et al., CVPR 2016, table 1), for ImageNet or with a 3x3 stem for 32x32 images.

Parameter names are those of torchvision, whose checkpoints load into the ImageNet form.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ._base import ConvBN, Manifold, ZooModel, conv, kaiming_fan_out_, on_manifold

__all__ = ["ResNet", "resnet18", "resnet34", "resnet50"]

Stem = Literal["cifar", "imagenet"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each followed by BatchNorm."""

    expansion: ClassVar[int] = 1
    scale_invariant: ClassVar[tuple[str, ...]] = ("conv1", "conv2")

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, channels, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, each followed by BatchNorm; stride in the 3x3, as in torchvision."""

    expansion: ClassVar[int] = 4
    scale_invariant: ClassVar[tuple[str, ...]] = ("conv1", "conv2", "conv3")

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = conv(in_channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv(channels, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, 4 * channels, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.downsample(x))


class ResNet(ZooModel):
    """Four stages of residual blocks, global pooling, one linear layer.

    Convolutions are initialised by He's normal rule with fan-out, BatchNorm gains at 1.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: blocks in each of the four stages.
        num_classes: outputs.
        in_channels: channels of the input.
        stem: ``"imagenet"``, a 7x7 convolution of stride 2 and max pooling, or ``"cifar"``, one 3x3
            convolution.
    """

    scale_invariant: ClassVar[tuple[str, ...]] = ("conv1",)

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        num_classes: int = 10,
        in_channels: int = 3,
        stem: Stem = "cifar",
    ) -> None:
        super().__init__()
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem must be 'cifar' or 'imagenet', got {stem!r}")
        large = stem == "imagenet"
        self.conv1 = conv(in_channels, 64, 7, stride=2) if large else conv(in_channels, 64, 3)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if large else nn.Identity()
        widths = [64, *(block.expansion * channels for channels in (64, 128, 256, 512))]
        self.layer1 = _stage(block, depths[0], widths[0], 64, stride=1)
        self.layer2 = _stage(block, depths[1], widths[1], 128, stride=2)
        self.layer3 = _stage(block, depths[2], widths[2], 256, stride=2)
        self.layer4 = _stage(block, depths[3], widths[3], 512, stride=2)
        self.fc = nn.Linear(widths[4], num_classes)
        kaiming_fan_out_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) to logits (N, num_classes)."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return ConvBN(in_channels, out_channels, 1, stride)


def _stage(
    block: type[BasicBlock] | type[Bottleneck], depth: int, in_channels: int, channels: int, stride: int
) -> nn.Sequential:
    first = block(in_channels, channels, stride)
    return nn.Sequential(first, *(block(channels * block.expansion, channels, 1) for _ in range(depth - 1)))


def resnet18(num_classes: int = 10, in_channels: int = 3, manifold: Manifold = None, *, stem: Stem = "cifar") -> ResNet:
    """ResNet-18: 11,173,962 parameters; with the ImageNet stem and 1000 classes 11,689,512."""
    return on_manifold(ResNet(BasicBlock, (2, 2, 2, 2), num_classes, in_channels, stem), manifold)


def resnet34(num_classes: int = 10, in_channels: int = 3, manifold: Manifold = None, *, stem: Stem = "cifar") -> ResNet:
    """ResNet-34: 21,282,122 parameters; with the ImageNet stem and 1000 classes 21,797,672."""
    return on_manifold(ResNet(BasicBlock, (3, 4, 6, 3), num_classes, in_channels, stem), manifold)


def resnet50(num_classes: int = 10, in_channels: int = 3, manifold: Manifold = None, *, stem: Stem = "cifar") -> ResNet:
    """ResNet-50: 23,520,842 parameters; with the ImageNet stem and 1000 classes 25,557,032."""
    return on_manifold(ResNet(Bottleneck, (3, 4, 6, 3), num_classes, in_channels, stem), manifold)
