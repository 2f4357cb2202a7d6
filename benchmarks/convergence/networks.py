"""Small convolutional networks of several widths and depths, for learning rates that may carry over or not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from retract.nets.cnn import ZooModel
from retract.nets.cnn._base import ConvBN, kaiming_fan_out_

__all__ = ["BASE", "DEPTHS", "SIZED", "WIDTHS", "SizedCNN", "sized_cnn"]

WIDTHS, DEPTHS = (8, 16, 32), (1, 2, 4)
MIDDLE = (16, 2)


def _name(width: int, depth: int) -> str:
    return f"cnn, width {width}, depth {depth}"


BASE = _name(*MIDDLE)
"""Where learning rates are tuned."""
SIZED = {
    _name(width, depth): (width, depth)
    for width, depth in (*((width, MIDDLE[1]) for width in WIDTHS), *((MIDDLE[0], depth) for depth in DEPTHS))
}
"""Width and depth by name: all widths at the middle depth, then all depths at the middle width."""


class SizedCNN(ZooModel):
    """Two stages of 3x3 convolutions with BatchNorm and ReLU, global pooling, one linear layer.

    `retract.nets.cnn.DigitsNet` is much the same with width 16 and depths 1 and 2. Convolutions are initialised by
    He's normal rule with fan-out.

    Args:
        width: channels of the first stage; the second, of half the resolution, has twice as many.
        depth: convolutions of a stage.
        num_classes: outputs.
        in_channels: channels of the input.
    """

    def __init__(self, width: int, depth: int, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, first_stride in ((width, 1), (2 * width, 2)):
            for index in range(depth):
                layers += [ConvBN(in_channels, channels, 3, first_stride if index == 0 else 1), nn.ReLU()]
                in_channels = channels
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(2 * width, num_classes)
        kaiming_fan_out_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) to logits (N, num_classes)."""
        logits: Tensor = self.fc(self.features(x).mean((2, 3)))
        return logits


def sized_cnn(name: str) -> Callable[..., SizedCNN]:
    """The constructor of the network of a name.

    Raises:
        ValueError: a name that is not of `SIZED`.
    """
    if name not in SIZED:
        raise ValueError(f"name must be one of {'; '.join(SIZED)}, got {name!r}")
    return partial(SizedCNN, *SIZED[name])
