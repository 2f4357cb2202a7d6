"""The networks of the canonical (CP) convolution experiments: no normalisation, so no scale-invariant weight.

Source: Veeramacheneni et al., "Canonical convolutional neural networks", IJCNN 2022 (arXiv 2206.01509).
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from retract.nets.parametrizations.canonical import start_canonical
from retract.nets.parametrizations.models import manifold_groups

from ._base import Manifold, ZooModel, on_manifold

__all__ = ["CifarAlexNet", "MnistConvNet", "cifar_alexnet", "mnist_convnet"]

Weights = Literal["plain", "weight_norm", "canonical"]

#: Terms of the convolutions in the authors' code, which looked for the least number that alternating least squares
#: fits a weight with. Linear layers have as many as their matrix has rows or columns.
_MNIST_RANKS = (11, 270)
_CIFAR_RANKS = (36, 571, 1626, 1948, 1644)


class _Unnormalized(ZooModel):
    """A network whose weights are on manifolds by their parametrization, if at all."""

    def manifold_groups(self, euclidean_lr: float | None = None) -> list[dict[str, Any]]:
        """Parameter groups for the optimizers of `retract.optim`: `retract.nets.manifold_groups` of the network."""
        return manifold_groups(self, euclidean_lr)


class MnistConvNet(_Unnormalized):
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


class CifarAlexNet(_Unnormalized):
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


def mnist_convnet(
    num_classes: int = 10,
    in_channels: int = 1,
    manifold: Manifold = None,
    *,
    weights: Weights = "plain",
    **canonical: Any,
) -> MnistConvNet:
    """The MNIST network of the paper: 1,199,882 parameters. ``manifold="psi"`` is an error.

    Args:
        num_classes: outputs.
        in_channels: channels of the input, 28x28 pixels.
        manifold: ``None``.
        weights: of all layers: ``"plain"``, ``"weight_norm"`` (torch's), or ``"canonical"`` with 11, 270, 128 and
            ``num_classes`` terms, as published: 1,226,038 parameters by the paper's count, which has dead vectors of
            unit modes (11) and a sigma a layer (4) that are not parameters here.
        canonical: options of `retract.nets.canonical_weight_norm`, ``form`` and ``init`` for example.
    """
    return _with_weights(
        on_manifold(MnistConvNet(num_classes, in_channels), manifold), weights, _MNIST_RANKS, canonical
    )


def cifar_alexnet(
    num_classes: int = 10,
    in_channels: int = 3,
    manifold: Manifold = None,
    *,
    weights: Weights = "plain",
    **canonical: Any,
) -> CifarAlexNet:
    """The AlexNet-like network of the paper: 6,976,842 parameters. ``manifold="psi"`` is an error.

    Args:
        num_classes: outputs.
        in_channels: channels of the input, 32x32 pixels.
        manifold: ``None``.
        weights: as in `mnist_convnet`; canonical with 36, 571, 1626, 1948, 1644, 1024, 512 and ``num_classes`` terms:
            9,253,171 parameters by the paper's count, of which eight are sigmas that are not parameters here.
        canonical: options of `retract.nets.canonical_weight_norm`.
    """
    return _with_weights(
        on_manifold(CifarAlexNet(num_classes, in_channels), manifold), weights, _CIFAR_RANKS, canonical
    )


Model = TypeVar("Model", bound=ZooModel)


def _with_weights(model: Model, weights: Weights, ranks: tuple[int, ...], options: dict[str, Any]) -> Model:
    """Parametrize all convolutions, by these ranks, and all linear layers."""
    if weights not in ("plain", "weight_norm", "canonical"):
        raise ValueError(f"weights must be 'plain', 'weight_norm' or 'canonical', got {weights!r}")
    if options and weights != "canonical":
        raise TypeError(f"{', '.join(options)}: an option of weights='canonical', got weights={weights!r}")
    if weights == "plain":
        return model
    remaining = iter(ranks)
    for layer in [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]:
        if weights == "weight_norm":
            weight_norm(layer)
        else:
            rank = next(remaining) if isinstance(layer, nn.Conv2d) else min(layer.weight.shape)
            start_canonical(layer, rank, **options)
    return model
