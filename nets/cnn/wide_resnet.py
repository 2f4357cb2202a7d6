"""Wide residual networks (Zagoruyko and Komodakis, BMVC 2016), with pre-activation blocks."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ._base import Manifold, ZooModel, conv, kaiming_fan_out_, on_manifold

__all__ = ["WideResNet", "wrn16_4", "wrn28_10"]


class PreActivationBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions.

    Only ``conv1`` feeds a BatchNorm alone. ``conv2`` and the shortcut add to the residual stream, where no
    filter can be rescaled without the others.
    """

    scale_invariant: ClassVar[tuple[str, ...]] = ("conv1",)

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3)
        changes = in_channels != out_channels or stride != 1
        self.shortcut = conv(in_channels, out_channels, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        skipped = x if self.shortcut is None else self.shortcut(active)
        total: Tensor = skipped + out
        return total


class WideResNet(ZooModel):
    """Depth 6n + 4: a stem, three stages of n blocks with 16k, 32k and 64k channels, one linear layer.

    The stem's filters are scale-invariant when k > 1: the first block then has a shortcut convolution
    behind its BatchNorm, so nothing else sees the stem. Convolutions are initialised by He's normal rule
    with fan-out.

    Args:
        depth: 6n + 4.
        width: k, the widening factor.
        num_classes: outputs.
        in_channels: channels of the input.
    """

    def __init__(self, depth: int, width: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6n + 4 with n >= 1, got {depth}")
        blocks = (depth - 4) // 6
        widths = [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = conv(in_channels, widths[0], 3)
        self.layer1 = _stage(blocks, widths[0], widths[1], stride=1)
        self.layer2 = _stage(blocks, widths[1], widths[2], stride=2)
        self.layer3 = _stage(blocks, widths[2], widths[3], stride=2)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)
        self.scale_invariant = ("conv1",) if width > 1 else ()
        kaiming_fan_out_(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, H, W), 32x32 in the paper, to logits (N, num_classes)."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        logits: Tensor = self.fc(F.relu(self.bn1(x)).mean((2, 3)))
        return logits


def _stage(blocks: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    first = PreActivationBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(PreActivationBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def wrn16_4(num_classes: int = 10, in_channels: int = 3, manifold: Manifold = None) -> WideResNet:
    """WRN-16-4: 2,748,890 parameters (published: 2.7M)."""
    return on_manifold(WideResNet(16, 4, num_classes, in_channels), manifold)


def wrn28_10(num_classes: int = 10, in_channels: int = 3, manifold: Manifold = None) -> WideResNet:
    """WRN-28-10: 36,479,194 parameters (published: 36.5M)."""
    return on_manifold(WideResNet(28, 10, num_classes, in_channels), manifold)
