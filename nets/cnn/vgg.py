"""VGG with BatchNorm for 32x32 images: convolutions of Simonyan and Zisserman (ICLR 2015), a linear head."""

from __future__ import annotations

from torch import Tensor, nn

from ._base import ConvBN, Manifold, ZooModel, kaiming_fan_out_, on_manifold

__all__ = ["VGG", "vgg11_bn", "vgg16_bn"]

_STAGES_11 = ((64,), (128,), (256, 256), (512, 512), (512, 512))
_STAGES_16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(ZooModel):
    """Stages of 3x3 convolution, BatchNorm and ReLU, max pooling after each stage, then one linear layer.

    Convolutions are initialised by He's normal rule with fan-out, the head by a normal law of deviation
    0.01, its bias at zero.

    Args:
        stages: channels of the convolutions, stage by stage.
        num_classes: outputs.
        in_channels: channels of the input.
    """

    def __init__(self, stages: tuple[tuple[int, ...], ...], num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage in stages:
            for channels in stage:
                layers += [ConvBN(in_channels, channels, 3), nn.ReLU()]
                in_channels = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(in_channels, num_classes)
        kaiming_fan_out_(self)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, H, W), H and W at least 32, to logits (N, num_classes)."""
        logits: Tensor = self.fc(self.features(x).mean((2, 3)))
        return logits


def vgg11_bn(num_classes: int = 10, in_channels: int = 3, manifold: Manifold = None) -> VGG:
    """VGG-11-BN: 9,228,362 parameters."""
    return on_manifold(VGG(_STAGES_11, num_classes, in_channels), manifold)


def vgg16_bn(num_classes: int = 10, in_channels: int = 3, manifold: Manifold = None) -> VGG:
    """VGG-16-BN: 14,724,042 parameters."""
    return on_manifold(VGG(_STAGES_16, num_classes, in_channels), manifold)
