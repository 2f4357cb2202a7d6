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

__all__ = [
    "FactoredConv1d",
    "FactoredConv2d",
    "FactoredConv3d",
    "FactoredConvTranspose1d",
    "FactoredConvTranspose2d",
    "FactoredConvTranspose3d",
    "FactoredEmbedding",
    "FactoredLinear",
]
