"""Layers that run on the factors of their weights."""

from .factored import (
    FactoredConv1d,
    FactoredConv2d,
    FactoredConv3d,
    FactoredConvTranspose1d,
    FactoredConvTranspose2d,
    FactoredConvTranspose3d,
    FactoredEmbedding,
    FactoredLinear,
)
from .low_rank import LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLinear, low_rank_layer
from .tensor import TensorConv1d, TensorConv2d, TensorConv3d, TensorLinear, tensor_layer
from .tensor_formats import FORMATS, tensor_network
from .tensor_network import TensorNetwork

__all__ = [
    "FORMATS",
    "FactoredConv1d",
    "FactoredConv2d",
    "FactoredConv3d",
    "FactoredConvTranspose1d",
    "FactoredConvTranspose2d",
    "FactoredConvTranspose3d",
    "FactoredEmbedding",
    "FactoredLinear",
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankConv3d",
    "LowRankLinear",
    "TensorConv1d",
    "TensorConv2d",
    "TensorConv3d",
    "TensorLinear",
    "TensorNetwork",
    "low_rank_layer",
    "tensor_layer",
    "tensor_network",
]
