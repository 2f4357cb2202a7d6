"""The networks of the canonical (CP) convolution experiments: no normalisation, so no scale-invariant weight.

Source: Veeramacheneni et al., "Canonical convolutional neural networks", IJCNN 2022 (arXiv 2206.01509).
"""

from __future__ import annotations

from torch import Tensor, nn

from ._base import Manifold, ZooModel, on_manifold

__all__ = ["CifarAlexNet", "MnistConvNet", "cifar_alexnet", "mnist_convnet"]


class MnistConvNet(ZooModel):
    """Two 3x3 convolutions, max pooling, two linear layers with dropout. Initialised by torch's defaults.

    Args:
        num_classes: outputs.
        in_channels: channels of the input, 28x28 pixels.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.25),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, 28, 28) to logits (N, num_classes)."""
        logits: Tensor = self.classifier(self.features(x))
        return logits


class CifarAlexNet(ZooModel):
    """Five 3x3 convolutions, three max poolings, three linear layers with dropout. Torch's initialisation.

    Args:
        num_classes: outputs.
        in_channels: channels of the input, 32x32 pixels.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 64, 3, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 192, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(),
            nn.Linear(4096, 1024),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(1024, 512),
            nn.ReLU(),
            nn.Linear(512, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, 32, 32) to logits (N, num_classes)."""
        logits: Tensor = self.classifier(self.features(x))
        return logits


def mnist_convnet(num_classes: int = 10, in_channels: int = 1, manifold: Manifold = None) -> MnistConvNet:
    """The MNIST network of the paper: 1,199,882 parameters. ``manifold="psi"`` is an error."""
    return on_manifold(MnistConvNet(num_classes, in_channels), manifold)


def cifar_alexnet(num_classes: int = 10, in_channels: int = 3, manifold: Manifold = None) -> CifarAlexNet:
    """The AlexNet-like network of the paper: 6,976,842 parameters. ``manifold="psi"`` is an error."""
    return on_manifold(CifarAlexNet(num_classes, in_channels), manifold)
