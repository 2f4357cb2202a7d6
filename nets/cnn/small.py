"""Small networks with BatchNorm: for 8x8 digits and for MNIST."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ._base import ConvBN, Manifold, ZooModel, kaiming_fan_out_, on_manifold

__all__ = ["DigitsNet", "LeNet5BN", "digitsnet", "lenet5_bn"]


class DigitsNet(ZooModel):
    """Three 3x3 convolutions (16, 32, 32 channels) with BatchNorm and ReLU, global pooling, one linear layer.

    Made for 8x8 images: an epoch of 1437 of them takes a fraction of a second on one core. Convolutions are
    initialised by He's normal rule with fan-out.

    Args:
        num_classes: outputs.
        in_channels: channels of the input.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.block1 = ConvBN(in_channels, 16, 3)
        self.block2 = ConvBN(16, 32, 3, stride=2)
        self.block3 = ConvBN(32, 32, 3)
        self.fc = nn.Linear(32, num_classes)
        kaiming_fan_out_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) to logits (N, num_classes)."""
        for block in (self.block1, self.block2, self.block3):
            x = F.relu(block(x))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class LeNet5BN(ZooModel):
    """LeNet-5 (LeCun et al., 1998) with ReLU, max pooling and BatchNorm after every layer but the last.

    Initialised by torch's defaults.

    Args:
        num_classes: outputs.
        in_channels: channels of the input, 28x28 pixels.
    """

    scale_invariant: ClassVar[tuple[str, ...]] = ("fc1", "fc2")

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.block1 = ConvBN(in_channels, 6, 5)
        self.block2 = ConvBN(6, 16, 5, padding=0)
        self.fc1 = nn.Linear(16 * 5 * 5, 120, bias=False)
        self.bn1 = nn.BatchNorm1d(120)
        self.fc2 = nn.Linear(120, 84, bias=False)
        self.bn2 = nn.BatchNorm1d(84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, 28, 28) to logits (N, num_classes)."""
        x = F.max_pool2d(F.relu(self.block1(x)), 2)
        x = F.max_pool2d(F.relu(self.block2(x)), 2).flatten(1)
        x = F.relu(self.bn1(self.fc1(x)))
        x = F.relu(self.bn2(self.fc2(x)))
        logits: Tensor = self.fc3(x)
        return logits


def digitsnet(num_classes: int = 10, in_channels: int = 1, manifold: Manifold = None) -> DigitsNet:
    """DigitsNet: 14,458 parameters."""
    return on_manifold(DigitsNet(num_classes, in_channels), manifold)


def lenet5_bn(num_classes: int = 10, in_channels: int = 1, manifold: Manifold = None) -> LeNet5BN:
    """LeNet-5 with BatchNorm: 61,932 parameters."""
    return on_manifold(LeNet5BN(num_classes, in_channels), manifold)
