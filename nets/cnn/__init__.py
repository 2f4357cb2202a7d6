"""Convolutional networks that know which of their weights are scale-invariant.

Every constructor takes ``num_classes``, ``in_channels`` and ``manifold``: ``"psi"`` makes the
scale-invariant weights `geoopt.ManifoldParameter` at construction. Every model has
``manifold_groups(euclidean_lr=None)``, the parameter groups for the PSI optimizers.
"""

from collections.abc import Callable

from ._base import ZooModel
from .resnet import ResNet, resnet18, resnet34, resnet50
from .resnet_cifar import CifarResNet, resnet8, resnet20, resnet32, resnet44, resnet56
from .small import DigitsNet, LeNet5BN, digitsnet, lenet5_bn
from .unnormalized import CifarAlexNet, MnistConvNet, cifar_alexnet, mnist_convnet
from .vgg import VGG, vgg11_bn, vgg16_bn
from .wide_resnet import WideResNet, wrn16_4, wrn28_10

__all__ = [
    "INPUT_SHAPES",
    "MODELS",
    "VGG",
    "CifarAlexNet",
    "CifarResNet",
    "DigitsNet",
    "LeNet5BN",
    "MnistConvNet",
    "ResNet",
    "WideResNet",
    "ZooModel",
    "cifar_alexnet",
    "digitsnet",
    "lenet5_bn",
    "mnist_convnet",
    "resnet8",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "vgg11_bn",
    "vgg16_bn",
    "wrn16_4",
    "wrn28_10",
]

MODELS: dict[str, Callable[..., ZooModel]] = {
    "digitsnet": digitsnet,
    "lenet5_bn": lenet5_bn,
    "mnist_convnet": mnist_convnet,
    "cifar_alexnet": cifar_alexnet,
    "vgg11_bn": vgg11_bn,
    "vgg16_bn": vgg16_bn,
    "resnet8": resnet8,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "wrn16_4": wrn16_4,
    "wrn28_10": wrn28_10,
}
"""Constructors by name."""

_DIGITS = {"digitsnet": (1, 8, 8), "lenet5_bn": (1, 28, 28), "mnist_convnet": (1, 28, 28)}

INPUT_SHAPES: dict[str, tuple[int, int, int]] = {name: _DIGITS.get(name, (3, 32, 32)) for name in MODELS}
"""Channels, height and width of one input of each model as built by default."""
