"""Weights with a prescribed rank and spectrum, as parametrizations of torch's layers."""

from .models import shared_frames, spectral_groups, spectral_weights
from .spectral import STTP, SVDP, sttp, svdp
from .spectral_regularization import SpectralRegularization, spectral_regularization

__all__ = [
    "STTP",
    "SVDP",
    "SpectralRegularization",
    "shared_frames",
    "spectral_groups",
    "spectral_regularization",
    "spectral_weights",
    "sttp",
    "svdp",
]
